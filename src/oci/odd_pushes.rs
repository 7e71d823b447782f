//! Tests of pushing, against registries that are scripts on 127.0.0.1.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::odd_registry::{Reply, Request, Sample, Server};
use super::push::{Content, Pushed};
use super::{Access, OciError, Sha256, Source, Target};

const BLOB: &[u8] = b"a blob of a few bytes";
const TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

fn digest() -> String {
    Sha256::of(BLOB).oci().replace(':', "%3A")
}

/// A target `new/app:acc` at the server, for a source `team/app` there.
fn target(server: &Server) -> Target {
    let reference = format!("127.0.0.1:{}/new/app:acc", server.port).parse().unwrap();
    Target::new(reference, &Access::default(), &server.source_with(&Access::default())).unwrap()
}

async fn push(server: &Server) -> Result<Pushed, OciError> {
    target(server).push_blob(Sha256::of(BLOB), BLOB.len() as u64, Content::Bytes(BLOB), &|_| ()).await
}

/// Method and path of every request, without the host's.
fn asked(server: &Server) -> Vec<String> {
    server.log.lock().unwrap().iter().map(|r| format!("{} {}", r.method, r.path.trim_start_matches("/v2/new/app/"))).collect()
}

fn status(status: u16) -> Reply {
    Reply::Whole(status, String::new(), Vec::new())
}

fn at(location: &str) -> Reply {
    Reply::Whole(202, format!("Location: {location}\r\n"), Vec::new())
}

/// Has no blob, answers POST with `post` and PUT with `put`.
async fn registry(mut post: impl FnMut(&Request) -> Reply + Send + 'static, mut put: impl FnMut(&Request) -> Reply + Send + 'static) -> Server {
    Server::start(move |request| match request.method.as_str() {
        "HEAD" => status(404),
        "POST" => post(request),
        "PUT" => put(request),
        _ => status(500),
    })
    .await
}

#[tokio::test]
async fn what_is_there_is_not_sent() {
    let server = Server::start(|_| status(200)).await;
    assert_eq!(push(&server).await.unwrap(), Pushed::Present);
    assert_eq!(asked(&server), [format!("HEAD blobs/{}", Sha256::of(BLOB).oci())]);
}

#[tokio::test]
async fn what_another_repository_has_is_mounted() {
    let server = registry(|_| status(201), |_| status(500)).await;
    assert_eq!(push(&server).await.unwrap(), Pushed::Mounted);
    assert_eq!(asked(&server)[1..], [format!("POST blobs/uploads/?mount={}&from=team%2Fapp", digest())]);
}

#[tokio::test]
async fn a_mount_that_is_no_mount_goes_on_as_an_upload_wherever_it_is_to_go() {
    for (location, path) in [
        ("/v2/new/app/blobs/uploads/1?_state=a%2Bb=", "PUT blobs/uploads/1?_state=a%2Bb=&"),
        ("1", "PUT blobs/uploads/1?"),
        ("http://127.0.0.1:PORT/v2/new/app/blobs/uploads/x?s=1", "PUT blobs/uploads/x?s=1&"),
    ] {
        let post = move |request: &Request| at(&location.replace("127.0.0.1:PORT", request.header("host").unwrap()));
        let server = registry(post, |_| status(201)).await;
        assert_eq!(push(&server).await.unwrap(), Pushed::Sent, "{location}");
        assert_eq!(asked(&server)[2], format!("{path}digest={}", digest()));
        let log = server.log.lock().unwrap();
        assert_eq!((log[2].body.as_bytes(), log[2].header("content-length")), (BLOB, Some("21")));
    }
}

#[tokio::test]
async fn a_broken_upload_begins_anew() {
    let (mut posts, mut puts) = (0, 0);
    let post = move |_: &Request| {
        posts += 1;
        if posts == 1 { status(503) } else { at(&format!("/v2/new/app/blobs/uploads/{posts}")) }
    };
    let put = move |_: &Request| {
        puts += 1;
        match puts {
            1 => Reply::Hangup,
            2 => status(429),
            3 => status(500),
            _ => status(201),
        }
    };
    let server = registry(post, put).await;
    let told = Mutex::new(Vec::new());
    let sent = |bytes| told.lock().unwrap().push(bytes);
    let pushed = target(&server).push_blob(Sha256::of(BLOB), BLOB.len() as u64, Content::Bytes(BLOB), &sent).await;
    assert_eq!(pushed.unwrap(), Pushed::Sent);
    let told = told.into_inner().unwrap();
    assert_eq!((told.iter().filter(|bytes| **bytes == 0).count(), told[0], told.last()), (4, 0, Some(&(BLOB.len() as u64))), "{told:?}");
    let puts: Vec<String> = asked(&server).into_iter().filter(|r| r.starts_with("PUT")).map(|r| r.chars().take(20).collect()).collect();
    assert_eq!(puts, ["PUT blobs/uploads/2?", "PUT blobs/uploads/3?", "PUT blobs/uploads/4?", "PUT blobs/uploads/5?"]);
}

/// A registry that takes a blob's bytes only once it is known that some of them have gone.
#[tokio::test]
async fn an_upload_under_way_says_how_far_it_is() {
    // More than the kernel takes before anybody reads.
    let blob = vec![7; 64 << 20];
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let reference = format!("{}/new/app:acc", listener.local_addr().unwrap()).parse().unwrap();
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            let answer = match head[0] {
                b'H' => "404 x",
                b'P' if head.starts_with(b"POST") => "202 x\r\nLocation: /u",
                _ => {
                    assert_eq!(told.recv().await, Some(0));
                    let some = told.recv().await.unwrap();
                    assert!(0 < some && some < 64 << 20, "{some}");
                    stream.read_exact(&mut vec![0; 64 << 20]).await.unwrap();
                    "201 x"
                }
            };
            stream.write_all(format!("HTTP/1.1 {answer}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").as_bytes()).await.unwrap();
        }
    });
    let source = Source::parse("example.com/team/app:1", &Access::default()).unwrap();
    let target = Target::new(reference, &Access::default(), &source).unwrap();
    let sent = |bytes| tell.send(bytes).unwrap_or_default();
    let pushed = target.push_blob(Sha256::of(&blob), blob.len() as u64, Content::Bytes(&blob), &sent).await;
    assert_eq!(pushed.unwrap(), Pushed::Sent);
}

/// The time that sending takes was once counted as silence, so layers that took longer than that were never pushed.
#[tokio::test]
async fn an_upload_may_take_longer_than_any_answer_may_be_silent() {
    let server = registry(|_| at("/u"), |_| Reply::Late(Duration::from_secs(4), 201)).await;
    assert_eq!(push(&server).await.unwrap(), Pushed::Sent);
    assert_eq!(server.requests().len(), 3, "in one go");
}

#[tokio::test]
async fn an_upload_that_gets_nowhere_begins_anew() {
    let mut puts = 0;
    let put = move |_: &Request| {
        puts += 1;
        if puts == 1 { Reply::Late(Duration::from_secs(7), 201) } else { status(201) }
    };
    let server = registry(|_| at("/u"), put).await;
    assert_eq!(push(&server).await.unwrap(), Pushed::Sent);
    assert_eq!(server.requests().len(), 5, "two uploads");
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    let unauthorized = || Reply::Whole(401, "WWW-Authenticate: Basic realm=x\r\n".to_owned(), Vec::new());
    let invalid = || Reply::Whole(400, String::new(), b"{\"errors\":[{\"code\":\"DIGEST_INVALID\"}]}".to_vec());
    type Made = Box<dyn FnMut(&Request) -> Reply + Send>;
    let cases: [(Made, Made, &str, &[&str]); 6] = [
        (Box::new(|_| status(403)), Box::new(|_| status(500)), "Denied", &["new/app"]),
        (Box::new(move |_| unauthorized()), Box::new(|_| status(500)), "Denied", &["new/app", "docker login"]),
        (Box::new(|_| status(405)), Box::new(|_| status(500)), "Denied", &["new/app", "read-only"]),
        (Box::new(|_| status(404)), Box::new(|_| status(500)), "NotFound", &["repository new/app that could be pushed to"]),
        (Box::new(|_| at("/u")), Box::new(move |_| invalid()), "Rejected", &["DIGEST_INVALID", "push it again"]),
        (Box::new(|_| status(202)), Box::new(|_| status(500)), "Malformed", &["does not say where to upload to"]),
    ];
    for (post, put, kind, parts) in cases {
        let server = registry(post, put).await;
        let error = push(&server).await.unwrap_err();
        assert!(format!("{error:?}").starts_with(kind), "{error:?}");
        for part in parts.iter().copied().chain([format!("127.0.0.1:{}", server.port).as_str()]) {
            assert!(error.to_string().contains(part), "{error} lacks {part}");
        }
    }
}

#[tokio::test]
async fn without_the_right_to_mount_the_bytes_are_sent() {
    let post = |request: &Request| if request.path.contains("mount=") { status(403) } else { at("/v2/new/app/blobs/uploads/1") };
    let server = registry(post, |_| status(201)).await;
    assert_eq!(push(&server).await.unwrap(), Pushed::Sent);
}

#[tokio::test]
async fn tokens_are_for_both_repositories() {
    let server = Server::start(|request| {
        if request.path.starts_with("/token") {
            return Reply::Whole(200, String::new(), b"{\"token\":\"t\"}".to_vec());
        }
        if request.header("authorization") != Some("Bearer t") {
            let host = request.header("host").unwrap();
            let challenge = format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\",scope=\"repository:new/app:pull other:x:y\"\r\n");
            return Reply::Whole(401, challenge, Vec::new());
        }
        status(if request.method == "HEAD" { 404 } else { 201 })
    })
    .await;
    assert_eq!(push(&server).await.unwrap(), Pushed::Mounted);
    let tokens: Vec<String> = server.requests().into_iter().filter(|path| path.starts_with("/token")).collect();
    assert_eq!(tokens, ["/token?scope=repository%3Anew%2Fapp%3Apull%2Cpush&scope=repository%3Ateam%2Fapp%3Apull&scope=other%3Ax%3Ay"]);
}

/// Two registries: the blob of the source is not what its digest says.
#[tokio::test]
async fn a_damaged_layer_is_never_sent_to_its_end() {
    let sample = Sample::new();
    let mut damaged = sample.clone();
    *damaged.layer.last_mut().unwrap() ^= 1;
    let path = sample.layer_path();
    let from = Server::start(move |request| {
        assert_eq!(request.path, path);
        Reply::Whole(200, String::new(), damaged.layer.clone())
    })
    .await;
    let complete = Arc::new(Mutex::new(0));
    let seen = complete.clone();
    let to = registry(
        |_| at("/u"),
        move |_| {
            *seen.lock().unwrap() += 1;
            status(201)
        },
    )
    .await;
    let source: Source = from.source_with(&Access::default());
    let reference = format!("127.0.0.1:{}/new/app:acc", to.port).parse().unwrap();
    let target = Target::new(reference, &Access::default(), &source).unwrap();
    let layer = sample.source_layer();
    let error = target.push_blob(layer.digest, layer.size, Content::Layer(&source, &layer), &|_| ()).await.unwrap_err();
    assert!(matches!(error, OciError::Damaged { .. }), "{error:?}");
    assert_eq!(*complete.lock().unwrap(), 0, "no request ever ended");
}

/// Answers a manifest's PUT with this header, and GET with `back`.
async fn manifest_registry(announced: Option<String>, back: &'static [u8]) -> Server {
    Server::start(move |request| match request.method.as_str() {
        "PUT" => Reply::Whole(201, announced.iter().map(|digest| format!("Docker-Content-Digest: {digest}\r\n")).collect(), Vec::new()),
        _ => Reply::Whole(200, String::new(), back.to_vec()),
    })
    .await
}

#[tokio::test]
async fn a_manifest_is_only_there_once_it_was_read_back() {
    let good = Sha256::of(b"{}");
    for (announced, back, expected) in [
        (Some(good.oci()), &b"{}"[..], Ok(good)),
        (None, b"{}", Ok(good)),
        (Some(Sha256::of(b"other").oci()), b"{}", Err("it calls it")),
        (None, b"{ }", Err("does not have manifest acc of new/app as it was sent")),
    ] {
        let server = manifest_registry(announced, back).await;
        let found = target(&server).push_manifest(TYPE, b"{}").await;
        match (found, expected) {
            (Ok(found), Ok(expected)) => assert_eq!(found, expected),
            (Err(error @ OciError::Rejected { .. }), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
            (found, expected) => panic!("{found:?}, expected {expected:?}"),
        }
        assert_eq!(server.log.lock().unwrap()[0].header("content-type"), Some(TYPE));
    }
}
