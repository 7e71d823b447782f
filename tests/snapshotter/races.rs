//! Many clients at once: one wins, nothing is lost, and nothing in use goes away.

use std::collections::HashMap;
use std::time::Instant;

use tokio::task::JoinSet;
use tonic::Code;

use crate::client::{Server, option};
use crate::trees::{PATIENCE, chain};

const CLIENTS: usize = 64;
const ROUNDS: usize = 8;

#[tokio::test(flavor = "multi_thread")]
async fn of_many_who_prepare_one_key_one_wins() {
    let (server, _dir) = Server::new().await;
    for round in 0..ROUNDS {
        let mut outcomes = JoinSet::new();
        for _ in 0..CLIENTS {
            let client = server.client.clone();
            outcomes.spawn(async move { client.prepare(&format!("key {round}"), "").await });
        }
        let outcomes = outcomes.join_all().await;
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
        assert!(outcomes.iter().all(|outcome| matches!(outcome, Ok(_) | Err(Code::AlreadyExists))), "{outcomes:?}");
    }
    assert_eq!(server.client.list(&[]).await.len(), ROUNDS);
}

#[tokio::test(flavor = "multi_thread")]
async fn parallel_pulls_of_one_image_share_its_snapshots() {
    let (server, dir) = Server::new().await;
    for number in 1..=3 {
        server.trees.add(chain(number), dir.path());
    }
    let mut pulls = JoinSet::new();
    for pull in 0..CLIENTS {
        let client = server.client.clone();
        pulls.spawn(async move {
            let mut parent = String::new();
            for number in 1..=3 {
                let target = chain(number).oci();
                assert_eq!(client.pull(&format!("{pull} extract {number}"), &parent, &target).await, Err(Code::AlreadyExists));
                parent = client.target(&parent, &target).await.expect("found");
            }
            parent
        });
    }
    let tops = pulls.join_all().await;
    assert!(tops.iter().all(|top| *top == tops[0]));
    assert_eq!(server.client.list(&[]).await.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_mounted_whenever_someone_has_its_mounts() {
    let (server, dir) = Server::new().await;
    server.trees.add(chain(1), dir.path());
    assert_eq!(server.client.pull("extract", "", &chain(1).oci()).await, Err(Code::AlreadyExists));
    let top = server.client.target("", &chain(1).oci()).await.expect("found");
    let mut containers = JoinSet::new();
    for container in 0..CLIENTS / 4 {
        let (client, trees, top) = (server.client.clone(), server.trees.clone(), top.clone());
        containers.spawn(async move {
            for round in 0..ROUNDS {
                let key = format!("{container} {round}");
                let mounts = client.prepare(&key, &top).await.expect("mounts");
                assert!(option(&mounts, "lowerdir").is_some());
                assert_eq!(trees.mounted(), [chain(1)], "released under a container that has just started");
                client.remove(&key).await.expect("removed");
            }
        });
    }
    containers.join_all().await;
    server.trees.wait_until_unmounted();
}

#[tokio::test(flavor = "multi_thread")]
async fn clean_up_takes_nothing_from_what_is_just_being_made() {
    let (server, _dir) = Server::new().await;
    let cleaning = {
        let client = server.client.clone();
        tokio::spawn(async move {
            loop {
                client.cleanup().await;
            }
        })
    };
    let mut makers = JoinSet::new();
    for maker in 0..8 {
        let client = server.client.clone();
        makers.spawn(async move {
            for round in 0..ROUNDS {
                let key = format!("{maker} {round}");
                let mounts = client.prepare(&key, "").await.expect("mounts");
                assert!(std::path::Path::new(&mounts[0].source).is_dir(), "{mounts:?}");
                client.commit(&format!("{key} done"), &key, HashMap::new()).await.expect("committed");
                assert!(std::path::Path::new(&mounts[0].source).is_dir(), "{mounts:?}");
            }
        });
    }
    makers.join_all().await;
    assert!(!cleaning.is_finished(), "a Cleanup failed");
    cleaning.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_is_called_off_can_be_tried_again_at_once() {
    let (server, dir) = Server::new().await;
    server.trees.add(chain(1), dir.path());
    let target = chain(1).oci();
    for round in 0..CLIENTS {
        let (client, key, target) = (server.client.clone(), format!("called off {round}"), target.clone());
        let call = tokio::spawn(async move { client.pull(&key, "", &target).await });
        tokio::task::yield_now().await;
        call.abort();
        let _ = call.await;
        assert_eq!(server.client.pull(&format!("again {round}"), "", &chain(1).oci()).await, Err(Code::AlreadyExists));
        let top = server.client.target("", &chain(1).oci()).await.expect("found");
        server.client.remove(&top).await.expect("what an aborted pull leaves, containerd's garbage collection removes");
    }
    // The server goes on with a call whose client is gone, so one may commit its snapshot after the last removal above.
    let begun = Instant::now();
    loop {
        let left = server.client.list(&[]).await;
        if left.is_empty() {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "these come again and again: {left:?}");
        for info in left {
            // It may have been committed, and so have another name, since it was listed.
            assert!(matches!(server.client.remove(&info.name).await, Ok(()) | Err(Code::NotFound)), "{info:?}");
        }
    }
}
