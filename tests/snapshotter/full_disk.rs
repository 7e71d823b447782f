//! A state directory without space: calls fail while it is full and work again after, without a restart.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use testbed::{Scratch, need, require};
use tonic::Code;

use crate::client::Server;
use crate::trees::Trees;

fn fill(disk: &Path) {
    let mut filler = File::create(disk.join("filler")).expect("created");
    for size in [1 << 20, 4096, 1] {
        let bytes = vec![1; size];
        while filler.write_all(&bytes).is_ok() {}
    }
}

#[test]
fn a_disk_that_was_full_for_a_while_needs_no_restart() {
    require!(need::root());
    let scratch = Scratch::new("full").expect("a scratch directory");
    let disk = scratch.make_dir("disk").expect("a directory");
    testbed::run("mount", ["-t", "tmpfs", "-o", "size=24m", "tmpfs", &disk.display().to_string()]).expect("a small disk");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let server = Server::start(&disk, Arc::new(Trees::new(None))).await;
        server.client.prepare("before", "").await.expect("mounts");
        fill(&disk);
        // The file has some room inside at first; sooner or later it has to grow.
        let mut made = 0;
        let refused = loop {
            let labels = HashMap::from([("large".to_owned(), "x".repeat(4000))]);
            match server.client.prepare_raw(&format!("key {made}"), "", labels).await {
                Ok(_) => made += 1,
                Err(status) => break status,
            }
        };
        assert_eq!(refused.code(), Code::Internal);
        assert!(refused.message().contains(&disk.display().to_string()), "{refused:?}");
        assert_eq!(server.client.list(&[]).await.len(), made + 1, "what is there can be read while the disk is full");
        assert!(server.client.stat("before").await.is_ok());
        fs::remove_file(disk.join("filler")).expect("removed");
        server.client.prepare("after", "").await.expect("mounts");
        assert_eq!(server.client.list(&[]).await.len(), made + 2);
    });
}
