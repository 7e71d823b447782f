//! A converted image, mounted by the node daemon, against its source.

#![allow(clippy::unwrap_used, reason = "a test's own set-up")]

mod ground;

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use ground::{Ground, Run, everything};
use testbed::{Slipwayd, SlipwaydConfig, binary, need, require, run};

/// Unmounts the view when the test ends, however it ends.
struct View<'a>(&'a Path, &'a Path);

impl Drop for View<'_> {
    fn drop(&mut self) {
        slipwayd(&["umount", self.0.to_str().unwrap()], self.1);
    }
}

fn slipwayd(args: &[&str], config: &Path) {
    let program = binary("slipwayd").unwrap();
    let args = [args, &["--config", config.to_str().unwrap()]].concat();
    if let Err(error) = run(program.to_str().unwrap(), args) {
        panic!("{error:#}");
    }
}

fn check(ground: &Ground, at: &Path) -> Run {
    ground.run(&["check", "oci:img:1", "oci:img:1", "--mount", at.to_str().unwrap()])
}

#[test]
fn a_mounted_image_is_its_source_and_every_change_of_it_is_named() {
    require!(need::root(), need::file_backed_erofs(), need::file_system("overlay"), need::path("/dev/fuse"));
    let ground = Ground::new("mounted");
    ground.layout.add("1", &everything()).unwrap();
    let chain = ground.convert("oci:img:1")["chain"].as_str().unwrap().to_owned();
    let node =
        Slipwayd::start(&ground.scratch.join("node"), &SlipwaydConfig::new(&ground.store(), [ground.scratch.join("state/key.pem.pub")])).unwrap();
    let (at, config) = (ground.scratch.make_dir("view").unwrap(), node.config());
    slipwayd(&["mount", &chain, at.to_str().unwrap()], &config);
    let view = View(&at, &config);
    let same = check(&ground, &at);
    assert_eq!(same.code, 0, "{}{}", same.out, same.err);
    assert!(same.out.contains(" 0 differences"), "{}", same.out);

    // The kernel stacks no third file system that could be written to: the changes are made to a copy.
    let copy = ground.scratch.join("copy");
    run("cp", ["-a", at.to_str().unwrap(), copy.to_str().unwrap()]).unwrap();
    drop(view);
    let same = check(&ground, &copy);
    assert_eq!(same.code, 0, "{}{}", same.out, same.err);

    let exact = copy.join("bin/exact");
    let time = fs::metadata(&exact).unwrap().modified().unwrap();
    let file = fs::OpenOptions::new().read(true).write(true).open(&exact).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 1000).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 1000).unwrap();
    file.set_modified(time).unwrap();
    fs::set_permissions(copy.join("etc/owned"), fs::Permissions::from_mode(0o600)).unwrap();
    run("setfattr", ["-x", "user.note", copy.join("etc/acl").to_str().unwrap()]).unwrap();
    let changed = check(&ground, &copy);
    assert_eq!(changed.code, 6, "{}{}", changed.out, changed.err);
    for part in
        ["bin/exact: has content with BLAKE3 ", "etc/owned: has mode 0644 in the source, 0600 in the image", "etc/acl: has extended attributes "]
    {
        assert!(changed.out.contains(part), "{part}: {}", changed.out);
    }
    assert!(changed.out.ends_with(" 3 differences\n"), "{}", changed.out);

    let nowhere = check(&ground, &ground.scratch.join("absent"));
    nowhere.assert_failed(1, &["absent", "--mount"]);
}
