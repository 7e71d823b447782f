//! Images looked at by `slipwayd mount`: apart from what containerd knows, and gone with the last view.

use slipway::node::client::{Client, ClientError};
use tonic::Code;

use crate::client::{Server, option};
use crate::trees::{Call, chain};

#[tokio::test(flavor = "multi_thread")]
async fn a_view_takes_everything_along_that_was_made_for_it_and_nothing_of_containerds() {
    let (server, dir) = Server::new().await;
    server.trees.add(chain(1), dir.path());
    // containerd has pulled the same image.
    assert_eq!(server.client.pull("extract", "", &chain(1).oci()).await, Err(Code::AlreadyExists));
    let pulled = server.client.list(&[]).await;

    let mut client = Client::connect(&dir.path().join("socket")).await.expect("connected");
    for key in ["one", "two"] {
        let mounts = client.view(key, &chain(1)).await.expect("mounts");
        assert!(option(&mounts, "lowerdir").is_some_and(|lower| lower.contains(dir.path().to_str().expect("text"))), "{mounts:?}");
    }
    assert_eq!(server.client.target("", &chain(1).oci()).await.as_ref(), Some(&pulled[0].name), "containerd finds its own only");
    client.remove_view("one").await.expect("removed");
    assert_eq!(server.client.list(&[]).await.len(), 3, "the other view is still there, and what it is made on");
    client.remove_view("two").await.expect("removed");
    assert_eq!(server.client.list(&[]).await, pulled);
    server.trees.wait_for(&Call::Release(chain(1)));
    client.remove_view("two").await.expect("nothing to remove is no error");

    server.client.view("theirs", &pulled[0].name).await.expect("mounts");
    client.remove_view("theirs").await.expect("removed");
    assert_eq!(server.client.list(&[]).await, pulled, "an image is not removed with a view of it that somebody else made");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_that_is_not_known_leaves_nothing_behind() {
    let (server, dir) = Server::new().await;
    let mut client = Client::connect(&dir.path().join("socket")).await.expect("connected");
    let error = client.view("one", &chain(1)).await.expect_err("not known");
    assert!(matches!(error, ClientError::Unknown { .. }), "{error}");
    assert_eq!(server.client.list(&[]).await, []);
}
