//! The kernel as judge: a converted image mounted as EROFS, its packs unpacked to flat files, against the layers unpacked by tar.

#![allow(clippy::unwrap_used, reason = "a test's own set-up")]

mod ground;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use erofs::digest::Digest;
use erofs::image::Image as Metadata;
use erofs::pack::{FOOTER_LEN, PackTable, decode_unit};
use ground::{Ground, everything, everything_layers};
use slipway::store::{Name, Store};
use testbed::{EntryKind, Layer, TreeDigest, need, require};

/// A pack's uncompressed space as a file, which is what its EROFS device holds.
fn unpack(store: &Store, digest: Digest, into: &Path) {
    let file = store.open_file(&Name::Pack(digest)).unwrap();
    let read = |at: u64, len: usize| {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    };
    let footer_at = file.metadata().unwrap().len() - FOOTER_LEN;
    let footer = PackTable::parse_footer(&digest, &read(footer_at, FOOTER_LEN as usize)).unwrap();
    let (at, len) = footer.unit_table();
    let table = PackTable::parse(footer, &read(at, len)).unwrap();
    let out = File::create(into).unwrap();
    for index in 0..table.unit_count() {
        let entry = table.unit(index).unwrap();
        let mut unit = vec![0; table.unit_len(index)];
        decode_unit(entry, &read(entry.offset, entry.stored_len as usize), &mut unit).unwrap();
        out.write_all_at(&unit, u64::from(index) * table.unit_bits().bytes()).unwrap();
    }
    out.set_len(u64::from(table.blocks()) * 4096).unwrap();
}

/// Mounts the converted image; gives the mount point.
fn mount(ground: &Ground, metadata: &str) -> PathBuf {
    let store = Store::open(&ground.store()).unwrap();
    let bytes = store.read_metadata(&metadata.parse().unwrap()).unwrap();
    let at = ground.scratch.make_dir("mount").unwrap();
    let image = ground.scratch.join("image.erofs");
    fs::write(&image, &bytes).unwrap();
    let mut options = "ro".to_owned();
    for device in Metadata::open(&bytes).unwrap().devices() {
        let path = ground.scratch.join(device.digest.to_string());
        unpack(&store, device.digest, &path);
        options.push_str(&format!(",device={}", path.display()));
    }
    // mount(8) would make a loop device of the image; the kernel takes the file itself.
    let mounted =
        rustix::mount::mount(&image, &at, "erofs", rustix::mount::MountFlags::RDONLY, Some(&*std::ffi::CString::new(&options[3..]).unwrap()));
    mounted.unwrap_or_else(|e| panic!("{e}: {options}"));
    at
}

/// What unpacking the layers with tar gives, whiteouts and opaque directories done by hand. Directories get the times their entries say
/// once everything is in place, and those without an entry what Slipway gives them.
fn unpack_layers(layers: &[Layer], into: &Path) {
    let mut dirs: BTreeMap<PathBuf, SystemTime> = BTreeMap::new();
    for layer in layers {
        for entry in &layer.entries {
            let path = into.join(&entry.path);
            let (dir, name) = (path.parent().unwrap(), path.file_name().unwrap().to_str().unwrap());
            if name == ".wh..wh..opq" {
                for child in fs::read_dir(dir).unwrap() {
                    remove(&child.unwrap().path());
                }
            } else if let Some(hidden) = name.strip_prefix(".wh.") {
                remove(&dir.join(hidden));
            }
        }
        let rest = Layer::new(layer.entries.iter().filter(|e| !e.path.contains(".wh.")).cloned());
        let mut tar = Command::new("tar")
            .args(["-xp", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-C"])
            .arg(into)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        tar.stdin.take().unwrap().write_all(&rest.tar()).unwrap();
        assert!(tar.wait().unwrap().success());
        for entry in rest.entries.iter().filter(|e| matches!(e.kind, EntryKind::Dir)) {
            let time = Duration::new(entry.mtime.0.try_into().unwrap(), entry.mtime.1);
            dirs.insert(into.join(&entry.path), SystemTime::UNIX_EPOCH + time);
        }
    }
    let mut todo = vec![into.to_owned()];
    while let Some(dir) = todo.pop() {
        todo.extend(fs::read_dir(&dir).unwrap().map(|e| e.unwrap()).filter(|e| e.file_type().unwrap().is_dir()).map(|e| e.path()));
        if !dirs.contains_key(&dir) {
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let time = dirs.get(&dir).copied().unwrap_or(SystemTime::UNIX_EPOCH);
        File::open(&dir).unwrap().set_modified(time).unwrap();
    }
}

fn remove(path: &Path) {
    match path.is_dir() {
        true => fs::remove_dir_all(path).unwrap(),
        false => fs::remove_file(path).unwrap(),
    }
}

#[test]
fn the_kernel_sees_every_file_as_tar_unpacks_it() {
    require!(need::root(), need::file_backed_erofs(), need::command("tar"));
    let ground = Ground::new("kernel");
    ground.layout.add("1", &everything()).unwrap();
    let done = ground.convert("oci:img:1");
    let mounted = mount(&ground, done["metadata"].as_str().unwrap());
    let expected = ground.scratch.make_dir("expected").unwrap();
    unpack_layers(&everything_layers(), &expected);
    TreeDigest::of(&expected).unwrap().assert_same(&TreeDigest::of(&mounted).unwrap());
}
