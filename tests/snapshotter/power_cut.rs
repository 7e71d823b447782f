//! The power goes: what containerd was told is committed has its content on disk.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;

use testbed::{LoopFs, Scratch, need, require};

use crate::client::Server;
use crate::trees::Trees;

/// A layer that was committed came back with empty files: the ledger's own write made their names durable, but not what was in them, and
/// containerd had no reason to unpack the layer again.
#[test]
fn a_committed_layer_outlives_a_power_cut() {
    require!(need::root(), need::command("mkfs.ext4"), need::path("/dev/loop-control"));
    let scratch = Scratch::new("power").expect("a scratch directory");
    let disk = LoopFs::new(&scratch.join("disk"), 64 << 20).expect("a disk");
    let content: Vec<u8> = (0..1_000_000_u32).map(|i| (i / 7) as u8).collect();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let upper = runtime.block_on(async {
        let server = Server::start(disk.path(), Arc::new(Trees::new(None))).await;
        let mounts = server.client.prepare("extract", "").await.expect("mounts");
        let upper = std::path::PathBuf::from(&mounts[0].source);
        fs::create_dir(upper.join("dir")).expect("a directory");
        fs::write(upper.join("dir/file"), &content).expect("a file");
        server.client.commit("layer", "extract", HashMap::new()).await.expect("committed");
        // What the disk holds at this moment; what is only in memory is not in it.
        fs::copy(scratch.join("disk.img"), scratch.join("later.img")).expect("a copy");
        upper
    });
    let later = scratch.make_dir("later").expect("a directory");
    testbed::run("mount", ["-o", "loop", &scratch.join("later.img").display().to_string(), &later.display().to_string()]).expect("mounted");
    runtime.block_on(async {
        let server = Server::start(&later, Arc::new(Trees::new(None))).await;
        server.client.stat("layer").await.expect("the ledger has it");
        let upper = later.join(upper.strip_prefix(disk.path()).expect("below the disk"));
        assert!(fs::read(upper.join("dir/file")).expect("the file is there") == content, "and so is what was in it");
    });
}
