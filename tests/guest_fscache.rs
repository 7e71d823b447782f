//! Backend `fscache` on a kernel that has it: Linux 6.1 in a guest, the real /dev/cachefiles, one image compared file by file, and the
//! worker killed and restarted while readers wait.

use std::fs;
use std::path::Path;
use std::time::Duration;

use testbed::{Compression, Converter, Entry, GuestKernel, Image, Layer, Layout, Scratch, TreeDigest, binary, need, noise, require, run};

/// Booting takes a second and the test a few; a guest on a loaded machine gets ample more.
const LIMIT: Duration = Duration::from_secs(180);

/// Random bytes with two bits unused, so that their units are stored compressed.
fn contents(len: usize, seed: u64) -> Vec<u8> {
    noise(seed, len).into_iter().map(|byte| byte & 0x3f).collect()
}

fn layers() -> [Layer; 2] {
    let small = (0..300).map(|i| Entry::file(&format!("etc/conf.d/{i:03}"), format!("setting = {i}\n").repeat(i % 40)));
    let base = [
        Entry::dir("etc").mode(0o750).owner(0, 42),
        Entry::dir("usr"),
        Entry::dir("usr/bin"),
        Entry::dir("usr/lib").mtime(1_500_000_000, 999_999_999),
        Entry::dir("usr/share"),
        Entry::dir("etc/conf.d"),
        Entry::file("usr/lib/big", contents(24 << 20, 1)).mtime(1_600_000_000, 123_456_789),
        Entry::file("usr/lib/reloaded", contents(48 << 20, 4)),
        Entry::file("usr/lib/gone", "under a whiteout"),
        Entry::file("usr/bin/tool", contents(300_000, 2)).mode(0o4755),
        Entry::symlink("usr/bin/alias", "tool"),
        Entry::hard_link("usr/bin/same", "usr/bin/tool").mode(0o4755),
        Entry::file("usr/share/labelled", "x").xattr("user.note", b"kept"),
        Entry::file("usr/share/empty", ""),
    ];
    let top = [Entry::whiteout("usr/lib/gone"), Entry::file("usr/lib/second", contents(3 << 20, 3)), Entry::file("etc/conf.d/007", "replaced\n")];
    [Layer::new(base.into_iter().chain(small)), Layer::new(top)]
}

#[test]
fn an_image_over_fscache_is_the_source_also_when_workers_die_or_are_restarted_in_mid_read() {
    require!(need::root(), need::path("/usr/src/linux-source-6.1.tar.xz"), need::command("umoci"), need::command("mkfs.ext4"));
    let guest = GuestKernel::find().expect("a guest kernel");
    let scratch = Scratch::new("guest-fscache").expect("scratch");
    let layout = Layout::create(&scratch.join("layout")).expect("an OCI layout");
    let image = layers().iter().fold(Image::new(), |image, layer| image.layer(layer, Compression::Gzip));
    let built = layout.add("latest", &image).expect("an image");
    let tagged = format!("{}:latest", layout.path().display());
    let (store, state, tree) = (scratch.make_dir("store").expect("a directory"), scratch.join("state"), scratch.join("bundle"));

    let converter = Converter::new(&state);
    converter.convert(&format!("oci:{tagged}"), &store).expect("conversion");
    fs::copy(converter.public_key(), scratch.join("key.pub")).expect("the converter's public key");
    run("umoci", ["unpack", "--image", &tagged, &tree.to_string_lossy()]).expect("an independent unpack");
    std::os::unix::fs::symlink(tree.join("rootfs"), scratch.join("tree")).expect("a name for the tree");

    let lister = binary("tree-digest").expect("tree-digest");
    let expected = run(&lister.to_string_lossy(), [tree.join("rootfs")]).expect("a listing");
    assert!(TreeDigest::of(&tree.join("rootfs")).expect("the unpacked tree").len() > 300);
    // No layer lists the root, so its times are the unpacker's own.
    let expected = expected.split_once('\n').expect("the root and more").1;
    fs::write(scratch.join("expected"), expected).expect("the listing is kept");

    let init = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/fscache.sh");
    let programs = lister.parent().expect("a directory of programs").to_string_lossy().into_owned();
    let env = [
        ("DIR", &*scratch.path().to_string_lossy()),
        ("BIN", &programs),
        ("CHAIN", built.top_chain()),
        ("BIG", "usr/lib/big"),
        ("RELOADED", "usr/lib/reloaded"),
    ];
    let console = guest.run(&scratch, &init, &env, LIMIT).expect("the guest runs to its end");

    assert!(console.contains("guest done") && !console.contains("FAILED"), "{console}");
    assert_eq!(console.matches("ok: ").count(), 15, "a check is missing:\n{console}");
}
