//! One client, one call after the other: the handshake of a pull, what gets mounted when, and what a bad store can do.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use slipway::metrics::Metrics;
use slipway::snapshot::proto::Kind;
use slipway::snapshot::{COMPACT_CHAIN, COMPACT_FILE, Snapshots};
use tonic::Code;

use crate::client::{Server, option, target_label};
use crate::trees::{Call, PATIENCE, Store, Trees, chain};

/// A pull that the test lets succeed for layers 1..=lazy of the chains 1, 2, 3; the name of the top snapshot.
async fn pull(server: &Server, lazy: u8, layers: u8) -> String {
    let mut parent = String::new();
    for number in 1..=layers {
        let target = chain(number).oci();
        let key = format!("k8s.io/7/extract-{number} {target}");
        parent = if number <= lazy {
            assert_eq!(server.client.pull(&key, &parent, &target).await, Err(Code::AlreadyExists), "layer {number}");
            server.client.target(&parent, &target).await.expect("containerd finds what it was told exists")
        } else {
            server.client.pull(&key, &parent, &target).await.expect("mounts for a plain layer");
            let name = format!("k8s.io/8/{target}");
            server.client.commit(&name, &key, target_label(&target)).await.expect("committed");
            name
        };
    }
    parent
}

fn know(server: &Server, dir: &Path, numbers: impl IntoIterator<Item = u8>) {
    for number in numbers {
        let tree = dir.join(format!("tree{number}"));
        std::fs::create_dir_all(&tree).expect("a tree");
        server.trees.add(chain(number), &tree);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_known_chain_exists_already_and_nothing_is_mounted_for_it() {
    let (server, dir) = Server::new().await;
    know(&server, dir.path(), 1..=3);
    let top = pull(&server, 3, 3).await;
    let info = server.client.stat(&top).await.expect("found");
    assert_eq!((info.kind(), info.labels.clone()), (Kind::Committed, target_label(&chain(3).oci())));
    assert_eq!(server.client.usage(&top).await, Ok((0, 0)));
    assert_eq!(server.client.list(&[]).await.len(), 3);
    assert_eq!(server.trees.calls(), [Call::Known(chain(1)), Call::Known(chain(2)), Call::Known(chain(3))]);
    // Again: the same snapshots.
    assert_eq!(pull(&server, 3, 3).await, top);
    assert_eq!(server.client.list(&[]).await.len(), 3);
    assert_eq!((server.metrics.chains_hit.get(), server.metrics.chains_missed.get()), (6, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_chain_is_a_plain_pull() {
    let (server, _dir) = Server::new().await;
    let top = pull(&server, 0, 3).await;
    let mounts = server.client.prepare("c1", &top).await.expect("mounts");
    assert_eq!(mounts[0].r#type, "overlay");
    assert_eq!(option(&mounts, "lowerdir").expect("lowers").split(':').count(), 3);
    assert_eq!((server.metrics.chains_hit.get(), server.metrics.chains_missed.get()), (0, 3));
    for label in ["", "sha256:12", "no digest at all"] {
        assert!(server.client.pull(label, "", label).await.is_ok(), "{label:?} names no chain");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compact_images_layer_is_never_unpacked() {
    let (server, dir) = Server::new().await;
    let source = chain(9).oci();
    let labels = |target: &[(String, String)]| -> HashMap<String, String> {
        [(COMPACT_CHAIN.to_owned(), source.clone())].into_iter().chain(target.iter().cloned()).collect()
    };
    let target: Vec<_> = target_label(&chain(1).oci()).into_iter().collect();
    for labels in [labels(&target), labels(&[])] {
        let status = server.client.prepare_raw("extract", "", labels).await.expect_err("a pull that fails");
        assert_eq!(status.code(), Code::Unavailable);
        for part in ["compact image", "holds no files", &source, "convert the image again", "portable"] {
            assert!(status.message().contains(part), "{part:?} is not in {:?}", status.message());
        }
    }
    assert_eq!(server.client.list(&[]).await.len(), 0, "a refusal leaves nothing");
    assert_eq!(server.metrics.chains_missed.get(), 1);
    // What the label says is nothing to go by: the chain it names is not even asked for.
    know(&server, dir.path(), [9]);
    assert_eq!(server.client.prepare_raw("extract", "", labels(&target)).await.map_err(|status| status.code()), Err(Code::Unavailable));
    assert!(!server.trees.calls().contains(&Call::Known(chain(9))));
    know(&server, dir.path(), [1]);
    assert_eq!(server.client.prepare_raw("extract", "", labels(&target)).await.map_err(|status| status.code()), Err(Code::AlreadyExists));
    let top = server.client.target("", &chain(1).oci()).await.expect("found");
    let tree = dir.path().join("tree1").display().to_string();
    let mounts = server.client.prepare("c1", &top).await.expect("mounts");
    assert_eq!(option(&mounts, "lowerdir"), Some(tree.as_str()), "and so is what is mounted");
    // Whatever somebody writes there cannot break a line of a log.
    let odd = HashMap::from([(COMPACT_CHAIN.to_owned(), format!("\u{1b}[2J\n{}", "x".repeat(5000)))]);
    let status = server.client.prepare_raw("extract", "", odd).await.expect_err("a pull that fails");
    assert!(status.message().len() < 500 && !status.message().contains(char::is_control), "{:?}", status.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compact_image_waits_for_a_slow_store_and_nothing_else_does() {
    let (server, dir) = Server::new().await;
    know(&server, dir.path(), [1]);
    let mut labels = target_label(&chain(1).oci());
    labels.insert(COMPACT_CHAIN.to_owned(), chain(9).oci());
    server.trees.behave(Store::Hanging);
    let waiting = {
        let (client, labels) = (server.client.clone(), labels.clone());
        tokio::spawn(async move { client.prepare_raw("extract", "", labels).await })
    };
    server.trees.wait_for(&Call::Known(chain(1)));
    // Each of these waits out the deadline of a plain pull.
    for key in ["one", "two", "three"] {
        assert!(server.client.pull(key, "", &chain(1).oci()).await.is_ok(), "any other pull is plain by now");
    }
    assert!(!waiting.is_finished());
    server.trees.behave(Store::Well);
    assert_eq!(waiting.await.expect("no panic").map_err(|status| status.code()), Err(Code::AlreadyExists));
    // Where the store is not to blame, it is not blamed.
    server.trees.behave(Store::Broken);
    let status = server.client.prepare_raw("extract", "", labels).await.expect_err("a pull that fails");
    for (part, there) in [("no way into the kernel works on this node (it is a test)", true), ("store", false), ("keys", false), ("portable", true)] {
        assert_eq!(status.message().contains(part), there, "{part:?}: {:?}", status.message());
    }
}

/// A pull without labels unpacks the layer, and what is committed once is never asked for again.
#[tokio::test(flavor = "multi_thread")]
async fn a_compact_images_layer_pulled_without_labels_is_not_committed() {
    let (server, dir) = Server::new().await;
    let name = chain(1).oci();
    let unpack = async |key: &str, parent: &str, name: &str, files: &[&str]| {
        let mounts = server.client.prepare(key, parent).await.expect("mounts");
        let upper = option(&mounts, "upperdir").map_or(mounts[0].source.clone(), str::to_owned);
        files.iter().for_each(|file| std::fs::write(Path::new(&upper).join(file), "x").expect("written"));
        server.client.commit(name, key, HashMap::new()).await
    };
    assert_eq!(unpack("extract", "", &name, &[COMPACT_FILE]).await, Err(Code::Unavailable));
    assert_eq!(server.client.stat(&name).await.map(drop), Err(Code::NotFound), "nothing is committed");
    server.client.remove("extract").await.expect("it goes as after any other failure");
    // A pull with labels finds the image then.
    know(&server, dir.path(), [1]);
    assert_eq!(pull(&server, 1, 1).await, server.client.target("", &name).await.expect("found"));
    // What only looks like it is somebody's image.
    assert_eq!(unpack("more", "", &name, &[COMPACT_FILE, "more"]).await, Ok(()));
    assert_eq!(unpack("above", &name, &chain(2).oci(), &[COMPACT_FILE]).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_image_is_mounted_for_the_first_user_and_released_after_the_last() {
    let (server, dir) = Server::new().await;
    know(&server, dir.path(), 1..=2);
    let top = pull(&server, 2, 2).await;
    let tree = dir.path().join("tree2").display().to_string();
    server.trees.calls();

    let mounts = server.client.prepare("c1", &top).await.expect("mounts");
    assert_eq!(option(&mounts, "lowerdir"), Some(tree.as_str()), "the whole image is one lower");
    assert!(option(&mounts, "upperdir").is_some());
    let view = server.client.view("v1", &top).await.expect("mounts");
    let empty = dir.path().join("state/empty").display().to_string();
    assert_eq!((view[0].r#type.as_str(), option(&view, "lowerdir")), ("overlay", Some(format!("{tree}:{empty}").as_str())));
    assert_eq!(option(&view, "upperdir"), None);
    assert_eq!(server.client.mounts("c1").await, Ok(mounts));
    assert_eq!(server.client.mounts(&top).await, Err(Code::FailedPrecondition));

    assert_eq!(server.client.remove(&top).await, Err(Code::FailedPrecondition), "it has children");
    server.client.remove("c1").await.expect("removed");
    assert_eq!(server.client.mounts("c1").await, Err(Code::NotFound));
    server.client.remove("v1").await.expect("removed");
    server.trees.wait_for(&Call::Release(chain(2)));
    assert_eq!(server.trees.calls().iter().filter(|call| matches!(call, Call::Release(_))).count(), 1);
    assert!(server.trees.mounted().is_empty());
    server.client.remove(&top).await.expect("removed");
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_above_a_known_prefix_are_unpacked_on_the_mounted_image() {
    let (server, dir) = Server::new().await;
    know(&server, dir.path(), 1..=1);
    let base = pull(&server, 1, 1).await;
    let mounts = server.client.pull("extract 2", &base, &chain(2).oci()).await.expect("mounts");
    let tree = dir.path().join("tree1").display().to_string();
    assert_eq!(option(&mounts, "lowerdir"), Some(tree.as_str()));
    assert_eq!(server.trees.mounted(), [chain(1)], "containerd's differ reads the lower without mounting anything");
    server.client.commit("two", "extract 2", HashMap::new()).await.expect("committed");
    server.trees.wait_for(&Call::Release(chain(1)));
    let mounts = server.client.prepare("c", "two").await.expect("mounts");
    assert!(option(&mounts, "lowerdir").expect("lowers").ends_with(&format!("/fs:{tree}")), "{mounts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_known_chain_on_plain_layers_uses_the_image_alone() {
    let (server, dir) = Server::new().await;
    let plain = pull(&server, 0, 1).await;
    know(&server, dir.path(), [2]);
    assert_eq!(server.client.pull("extract 2", &plain, &chain(2).oci()).await, Err(Code::AlreadyExists));
    let top = server.client.target(&plain, &chain(2).oci()).await.expect("found");
    let mounts = server.client.prepare("c", &top).await.expect("mounts");
    assert_eq!(option(&mounts, "lowerdir"), Some(dir.path().join("tree2").display().to_string().as_str()));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_chain_on_two_parents_is_two_snapshots() {
    let (server, dir) = Server::new().await;
    know(&server, dir.path(), 1..=2);
    let lazy = pull(&server, 1, 1).await;
    server.trees.forget(chain(1));
    let plain = pull(&server, 0, 1).await;
    let target = chain(2).oci();
    for parent in [&plain, &lazy] {
        assert_eq!(server.client.pull("extract", parent, &target).await, Err(Code::AlreadyExists));
    }
    let (on_plain, on_lazy) = (server.client.target(&plain, &target).await, server.client.target(&lazy, &target).await);
    assert!(on_plain.is_some() && on_lazy.is_some() && on_plain != on_lazy, "{on_plain:?} {on_lazy:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_store_makes_a_pull_plain_and_nothing_else_wait() {
    let (server, dir) = Server::new().await;
    know(&server, dir.path(), 1..=1);
    let base = pull(&server, 1, 1).await;
    server.trees.behave(Store::Hanging);
    let begun = Instant::now();
    let mounts = server.client.pull("extract", "", &chain(1).oci()).await.expect("plain mounts");
    assert_eq!(mounts[0].r#type, "bind");
    // A container that has to wait for its image keeps nobody else waiting.
    let waiting = {
        let client = server.client.clone();
        tokio::spawn(async move { client.prepare("c", &base).await })
    };
    server.trees.wait_for(&Call::Mount(chain(1)));
    assert!(server.client.prepare("other", "").await.is_ok());
    assert!(server.client.stat("other").await.is_ok());
    assert!(server.client.usage("other").await.is_ok());
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert!(!waiting.is_finished());
    server.trees.behave(Store::Well);
    assert!(waiting.await.expect("no panic").is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_whose_image_is_gone_fails_with_the_reason_and_leaves_nothing() {
    let (server, dir) = Server::new().await;
    know(&server, dir.path(), 1..=1);
    let top = pull(&server, 1, 1).await;
    server.trees.behave(Store::Broken);
    let status = server.client.prepare_raw("c", &top, HashMap::new()).await.expect_err("no mounts");
    assert_eq!(status.code(), Code::Unavailable);
    let wanted = format!("the image of chain {} cannot be mounted: the store has lost it", chain(1));
    assert_eq!(status.message(), wanted);
    assert_eq!(server.client.stat("c").await.map(|info| info.name), Err(Code::NotFound));
    server.trees.behave(Store::Well);
    assert!(server.client.prepare("c", &top).await.is_ok(), "the same key again");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_every_ten_seconds_touches_no_image() {
    let (server, dir) = Server::new().await;
    know(&server, dir.path(), 1..=1);
    let top = pull(&server, 1, 1).await;
    server.client.prepare("c", &top).await.expect("mounts");
    server.trees.calls();
    server.trees.behave(Store::Hanging);
    for info in server.client.list(&[]).await {
        server.client.stat(&info.name).await.expect("found");
        server.client.usage(&info.name).await.expect("counted");
    }
    server.client.cleanup().await;
    assert_eq!(server.trees.calls(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_everything_and_tells_which_images_are_in_use() {
    let (server, dir) = Server::new().await;
    know(&server, dir.path(), 1..=2);
    let base = pull(&server, 1, 1).await;
    let top = pull(&server, 2, 2).await;
    server.client.prepare("c", &top).await.expect("mounts");
    server.client.prepare("plain", "").await.expect("mounts");
    let before = server.client.list(&[]).await;
    let orphan = dir.path().join("state/s/4711/fs");
    std::fs::create_dir_all(&orphan).expect("made");
    drop(server);

    let trees = Arc::new(Trees::new(None));
    // The old server lets go of the ledger when its last connection is closed.
    let begun = Instant::now();
    while let Err(error) = Snapshots::open(&dir.path().join("state"), Arc::new(Trees::new(None)), Arc::new(Metrics::new("none"))) {
        assert!(begun.elapsed() < PATIENCE, "the old server still has the ledger: {error}");
        tokio::task::yield_now().await;
    }
    let server = Server::start(dir.path(), trees.clone()).await;
    assert_eq!(server.trees.calls(), [Call::Recover(vec![chain(2)])]);
    assert_eq!(server.client.list(&[]).await, before);
    assert!(!orphan.exists());
    assert!(dir.path().join("state/s").join("3").exists(), "the container's directory");
    assert_eq!(server.client.remove(&base).await, Err(Code::FailedPrecondition));
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_never_paths() {
    let (server, dir) = Server::new().await;
    for key in ["../../escape", "/etc/passwd", "a b/c: d,e", "é\u{0}"] {
        server.client.prepare(key, "").await.expect("mounts");
        server.client.commit(&format!("{key} done"), key, HashMap::new()).await.expect("committed");
    }
    let mut names: Vec<_> = std::fs::read_dir(dir.path().join("state/s")).expect("read").map(|entry| entry.expect("read").file_name()).collect();
    names.sort();
    assert_eq!(names, ["1", "2", "3", "4"]);
}
