//! Tests of mirrors and where they fall short, with servers that are scripts on 127.0.0.1.

use testbed::DeadAddress;

use super::odd_registry::{Reply, Sample, Server, oci_error, read_layer_of};
use super::{Access, Logins, OciError, Platform, Source};

/// An image of a registry that has these hosts, as `hosts.toml` names them, and the directory of that file.
fn source(registry: u16, hosts: &[(u16, &str)]) -> (Source, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join(format!("127.0.0.1_{registry}_"));
    std::fs::create_dir(&at).unwrap();
    let table = |(port, more): &(u16, &str)| format!("[host.\"http://127.0.0.1:{port}\"]\n{more}\n");
    std::fs::write(at.join("hosts.toml"), hosts.iter().map(table).collect::<String>()).unwrap();
    let access = Access { hosts_dir: Some(dir.path().to_owned()), ..Access::default() };
    (Source::parse(&format!("127.0.0.1:{registry}/team/app:1"), &access).unwrap(), dir)
}

async fn good(sample: &Sample) -> Server {
    let answers = sample.clone();
    Server::start(move |request| {
        let plain = super::odd_registry::Request { path: request.path.split('?').next().unwrap().to_owned(), ..request.clone() };
        answers.reply(&plain)
    })
    .await
}

fn port_of(dead: &DeadAddress) -> u16 {
    dead.host().rsplit_once(':').unwrap().1.parse().unwrap()
}

#[tokio::test]
async fn mirrors_are_asked_first_in_order_and_told_which_registry_is_meant() {
    let sample = Sample::new();
    let (first, second, registry) = (good(&sample).await, good(&sample).await, good(&sample).await);
    let headers = "[host.\"http://127.0.0.1:PORT\".header]\nx-key = \"k\"".replace("PORT", &first.port.to_string());
    let (source, _dir) = source(registry.port, &[(first.port, &headers), (second.port, "")]);
    source.resolve(&Platform::host()).await.unwrap();
    assert_eq!(read_layer_of(&source, &sample).await.unwrap(), sample.layer);
    assert_eq!((first.requests().len(), second.requests().len(), registry.requests().len()), (3, 0, 0));
    for request in &*first.log.lock().unwrap() {
        assert!(request.path.ends_with(&format!("?ns=127.0.0.1%3A{}", registry.port)), "{}", request.path);
        assert_eq!(request.header("x-key"), Some("k"));
    }
}

#[tokio::test]
async fn a_mirror_that_fails_is_passed_over() {
    let sample = Sample::new();
    for status in [404u16, 500, 401, 200] {
        let mirror = Server::start(move |_| Reply::Whole(status, String::new(), b"<html>".to_vec())).await;
        let registry = good(&sample).await;
        let dead = DeadAddress::new().unwrap();
        let (source, _dir) = source(registry.port, &[(port_of(&dead), ""), (mirror.port, "")]);
        source.resolve(&Platform::host()).await.unwrap_or_else(|e| panic!("{status}: {e}"));
        assert!(!mirror.requests().is_empty());
    }
}

#[tokio::test]
async fn a_tag_is_only_resolved_by_hosts_that_may() {
    let sample = Sample::new();
    let (mirror, registry) = (good(&sample).await, good(&sample).await);
    let (source, _dir) = source(registry.port, &[(mirror.port, "capabilities = [\"pull\"]")]);
    source.resolve(&Platform::host()).await.unwrap();
    assert_eq!(registry.requests(), ["/v2/team/app/manifests/1"]);
    assert_eq!(mirror.requests().len(), 1, "the configuration");
}

#[tokio::test]
async fn the_error_names_every_host_with_its_own_reason() {
    let mirror = Server::start(|_| Reply::Whole(503, String::new(), b"on holiday".to_vec())).await;
    let registry = Server::start(|_| Reply::Whole(404, String::new(), Vec::new())).await;
    let dead = DeadAddress::new().unwrap();
    let (source, _dir) = source(registry.port, &[(port_of(&dead), ""), (mirror.port, "")]);
    let error = source.resolve(&Platform::host()).await.unwrap_err();
    let text = error.to_string();
    for part in [
        "no host gave manifest 1 of team/app".to_owned(),
        format!("{}: no usable answer", dead.host()),
        format!("127.0.0.1:{}: 127.0.0.1:{0} answered HTTP status 503", mirror.port),
        "on holiday".to_owned(),
        format!("127.0.0.1:{} has no manifest 1", registry.port),
    ] {
        assert!(text.contains(&part), "{text:?} lacks {part:?}");
    }
    assert_eq!(mirror.requests().len(), 2, "a mirror gets a second chance, not five");
}

#[tokio::test]
async fn a_host_that_was_down_is_asked_last_from_then_on() {
    let sample = Sample::new();
    let mirror = Server::start(|_| Reply::Whole(503, String::new(), Vec::new())).await;
    let registry = good(&sample).await;
    let (source, _dir) = source(registry.port, &[(mirror.port, "")]);
    source.resolve(&Platform::host()).await.unwrap();
    assert_eq!((mirror.requests().len(), registry.requests().len()), (2, 2));
}

#[tokio::test]
async fn a_mirror_that_asks_to_wait_is_passed_over_at_once() {
    let sample = Sample::new();
    let mirror = Server::start(|_| Reply::Whole(429, "Retry-After: 30\r\n".to_owned(), Vec::new())).await;
    let registry = good(&sample).await;
    let (source, _dir) = source(registry.port, &[(mirror.port, "")]);
    tokio::time::timeout(std::time::Duration::from_secs(20), source.resolve(&Platform::host())).await.expect("nobody waits").unwrap();
    assert_eq!((mirror.requests().len(), registry.requests().len()), (1, 2));
}

#[tokio::test]
async fn a_layer_goes_on_at_the_next_host_where_a_mirror_broke_off() {
    let sample = Sample::new();
    let answers = sample.clone();
    let mut first = true;
    let mirror = Server::start(move |_| match std::mem::take(&mut first) {
        true => Reply::Broken("200 OK".to_owned(), answers.layer.clone(), 300_000),
        false => Reply::Hangup,
    })
    .await;
    let registry = good(&sample).await;
    let (source, _dir) = source(registry.port, &[(mirror.port, "")]);
    assert_eq!(read_layer_of(&source, &sample).await.unwrap(), sample.layer);
    assert_eq!(registry.log.lock().unwrap()[0].header("range"), Some("bytes=300000-"));
}

#[tokio::test]
async fn a_host_with_wrong_bytes_for_a_layer_is_not_asked_for_it_again() {
    let sample = Sample::new();
    let wrong = sample.layer.iter().map(|b| b ^ 1).collect::<Vec<u8>>();
    let mirror = Server::start(move |_| Reply::Whole(200, String::new(), wrong.clone())).await;
    let registry = good(&sample).await;
    let (source, _dir) = source(registry.port, &[(mirror.port, "")]);
    read_layer_of(&source, &sample).await.unwrap_err();
    assert!(source.was_wrong(&sample.source_layer()));
    assert_eq!(read_layer_of(&source, &sample).await.unwrap(), sample.layer);
    assert!(!source.was_wrong(&sample.source_layer()), "no host is left");
    let error = read_layer_of(&source, &sample).await.unwrap_err();
    assert!(matches!(oci_error(&error), OciError::Unsupported { .. }), "{error:?}");
}

#[tokio::test]
async fn wrong_manifests_and_configurations_come_from_the_next_host() {
    let sample = Sample::new();
    let answers = sample.clone();
    let mirror = Server::start(move |request| {
        let plain = super::odd_registry::Request { path: request.path.split('?').next().unwrap().to_owned(), ..request.clone() };
        match answers.reply(&plain) {
            Reply::Whole(status, headers, mut body) => {
                body[20] ^= 1;
                Reply::Whole(status, headers, body)
            }
            reply => reply,
        }
    })
    .await;
    let registry = good(&sample).await;
    let (source, _dir) = source(registry.port, &[(mirror.port, "")]);
    source.resolve(&Platform::host()).await.unwrap();
    assert_eq!((mirror.requests().len(), registry.requests().len()), (2, 2));
}

#[tokio::test]
async fn a_registrys_login_is_not_for_its_mirror() {
    let (sample, logins) = (Sample::new(), tempfile::tempdir().unwrap());
    let mirror = Server::start(|_| Reply::Whole(401, "WWW-Authenticate: Basic realm=x\r\n".to_owned(), Vec::new())).await;
    let registry = good(&sample).await;
    let (_, dir) = source(registry.port, &[(mirror.port, "")]);
    let file = logins.path().join("config.json");
    std::fs::write(&file, format!("{{\"auths\": {{\"127.0.0.1:{}\": {{\"auth\": \"YTpi\"}}}}}}", registry.port)).unwrap();
    let access = Access { hosts_dir: Some(dir.path().to_owned()), logins: Logins::in_files(vec![file]), ..Access::default() };
    let source = Source::parse(&format!("127.0.0.1:{}/team/app:1", registry.port), &access).unwrap();
    source.resolve(&Platform::host()).await.unwrap();
    assert!(mirror.log.lock().unwrap().iter().all(|request| request.header("authorization").is_none()));
}
