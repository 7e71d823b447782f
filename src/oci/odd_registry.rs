//! Tests of the registry client against registries that misbehave, each a script for a tiny HTTP server on 127.0.0.1.

use std::io::Read;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::source::SourceImage;
use super::{Access, ChainId, DiffId, OciError, Platform, Sha256, Source, SourceLayer, VerifyError, VerifyReader};

const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// What a handler does with one request.
pub(super) enum Reply {
    /// Status, extra headers, body; Content-Length is added.
    Whole(u16, String, Vec<u8>),
    /// Announces the body's length, sends only so many bytes of it and breaks the connection.
    Broken(String, Vec<u8>, usize),
    /// Closes without an answer.
    Hangup,
    /// This status, after so much silence.
    Late(Duration, u16),
    /// A body without a length, ended by closing.
    Unframed(Vec<u8>),
}

/// A request as far as registries look at it.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub method: String,
    pub path: String,
    pub headers: Vec<String>,
    pub body: String,
}

impl Request {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find_map(|h| h.split_once(": ").filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v))
    }

    pub(super) fn range_start(&self) -> usize {
        self.header("range").map_or(0, |r| r.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap())
    }
}

/// The server: its port and the log of requests.
pub(super) struct Server {
    pub port: u16,
    pub log: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    pub(super) async fn start(mut handler: impl FnMut(&Request) -> Reply + Send + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let log = Arc::new(Mutex::new(Vec::new()));
        let server = Server { port, log: log.clone() };
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let Some(request) = read_request(&mut stream).await else { continue };
                log.lock().unwrap().push(request.clone());
                send(stream, handler(&request)).await;
            }
        });
        server
    }

    pub(super) fn requests(&self) -> Vec<String> {
        self.log.lock().unwrap().iter().map(|r| r.path.clone()).collect()
    }

    fn source(&self) -> Source {
        self.source_with(&Access::default())
    }

    pub(super) fn source_with(&self, access: &Access) -> Source {
        Source::parse(&format!("127.0.0.1:{}/team/app:1", self.port), access).unwrap()
    }
}

async fn read_request(stream: &mut TcpStream) -> Option<Request> {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        bytes.push(stream.read_u8().await.ok()?);
    }
    let text = String::from_utf8(bytes).unwrap();
    let mut lines = text.lines();
    let mut words = lines.next()?.split(' ').map(str::to_owned);
    let (method, path) = (words.next()?, words.next()?);
    let mut request = Request { method, path, headers: lines.map(str::to_owned).collect(), body: String::new() };
    let mut body = vec![0; request.header("content-length").map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).await.ok()?;
    request.body = String::from_utf8(body).unwrap();
    Some(request)
}

async fn send(mut stream: TcpStream, reply: Reply) {
    let (head, body, sent) = match reply {
        Reply::Hangup => return,
        Reply::Late(silence, status) => {
            tokio::time::sleep(silence).await;
            (format!("HTTP/1.1 {status} x\r\nContent-Length: 0\r\n"), Vec::new(), 0)
        }
        Reply::Whole(status, extra, body) => {
            let sent = body.len();
            (format!("HTTP/1.1 {status} x\r\nContent-Length: {}\r\n{extra}", body.len()), body, sent)
        }
        Reply::Broken(status, body, sent) => (format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n", body.len()), body, sent),
        Reply::Unframed(body) => {
            let sent = body.len();
            ("HTTP/1.1 200 OK\r\n".to_owned(), body, sent)
        }
    };
    // The client may have gone: its business.
    let _ = stream.write_all(format!("{head}Connection: close\r\n\r\n").as_bytes()).await;
    let _ = stream.write_all(&body[..sent]).await;
    let _ = stream.shutdown().await;
}

/// An image of one layer whose blob is `layer`.
#[derive(Clone)]
pub(super) struct Sample {
    pub manifest: Vec<u8>,
    pub config: Vec<u8>,
    pub layer: Vec<u8>,
}

impl Sample {
    pub(super) fn new() -> Sample {
        let layer: Vec<u8> = (0..200_000u32).flat_map(|i| i.to_le_bytes()).collect();
        let host = Platform::host();
        let config = json!({"os": host.os, "architecture": host.architecture,
            "rootfs": {"type": "layers", "diff_ids": [Sha256::of(&layer).oci()]}})
        .to_string()
        .into_bytes();
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST_TYPE,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": Sha256::of(&config).oci(), "size": config.len()},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": Sha256::of(&layer).oci(), "size": layer.len()}]})
        .to_string()
        .into_bytes();
        Sample { manifest, config, layer }
    }

    pub(super) fn source_layer(&self) -> SourceLayer {
        let digest = Sha256::of(&self.layer);
        SourceLayer { digest, size: self.layer.len() as u64, media_type: String::new(), diff_id: DiffId(digest), chain_id: ChainId(digest) }
    }

    pub(super) fn layer_path(&self) -> String {
        format!("/v2/team/app/blobs/{}", Sha256::of(&self.layer).oci())
    }

    /// What a good registry answers.
    pub(super) fn reply(&self, request: &Request) -> Reply {
        let config_path = format!("/v2/team/app/blobs/{}", Sha256::of(&self.config).oci());
        if request.path == "/v2/team/app/manifests/1" {
            let digest = Sha256::of(&self.manifest).oci();
            Reply::Whole(200, format!("Content-Type: {MANIFEST_TYPE}\r\nDocker-Content-Digest: {digest}\r\n"), self.manifest.clone())
        } else if request.path == config_path {
            Reply::Whole(200, String::new(), self.config.clone())
        } else if request.path == self.layer_path() {
            match request.range_start() {
                0 => Reply::Whole(200, String::new(), self.layer.clone()),
                from => {
                    let range = format!("Content-Range: bytes {from}-{}/{}\r\n", self.layer.len() - 1, self.layer.len());
                    Reply::Whole(206, range, self.layer[from..].to_vec())
                }
            }
        } else {
            Reply::Whole(404, String::new(), Vec::new())
        }
    }
}

async fn resolve(server: &Server) -> Result<SourceImage, OciError> {
    server.source().resolve(&Platform::host()).await
}

/// Reads the layer through verification, as the converter does.
async fn read_layer(server: &Server, sample: &Sample) -> std::io::Result<Vec<u8>> {
    read_layer_of(&server.source(), sample).await
}

pub(super) async fn read_layer_of(source: &Source, sample: &Sample) -> std::io::Result<Vec<u8>> {
    let layer = sample.source_layer();
    let stream = source.open_layer(&layer).await.map_err(std::io::Error::other)?;
    let bridge = tokio_util::io::SyncIoBridge::new(stream);
    tokio::task::spawn_blocking(move || {
        let mut out = Vec::new();
        VerifyReader::new(bridge, "layer 1", layer.digest, Some(layer.size)).read_to_end(&mut out).map(|_| out)
    })
    .await
    .unwrap()
}

pub(super) fn oci_error(error: &std::io::Error) -> &OciError {
    error.get_ref().and_then(|e| e.downcast_ref()).unwrap_or_else(|| panic!("not an OciError: {error:?}"))
}

#[tokio::test]
async fn a_good_registry_is_read() {
    let sample = Sample::new();
    let answers = sample.clone();
    let server = Server::start(move |request| answers.reply(request)).await;
    let image = resolve(&server).await.unwrap();
    assert_eq!(image.name, format!("127.0.0.1:{}/team/app:1", server.port));
    assert_eq!(image.manifest_digest, Sha256::of(&sample.manifest));
    assert_eq!(image.layers[0].diff_id.0, Sha256::of(&sample.layer));
    assert_eq!(read_layer(&server, &sample).await.unwrap(), sample.layer);
}

#[tokio::test]
async fn failures_that_pass_are_waited_out() {
    let sample = Sample::new();
    let mut answers = vec![
        Reply::Hangup,
        Reply::Whole(429, "Retry-After: 0\r\n".to_owned(), Vec::new()),
        Reply::Whole(500, String::new(), Vec::new()),
        Reply::Broken("200 OK".to_owned(), sample.manifest.clone(), 10),
    ]
    .into_iter();
    let server = Server::start(move |request| answers.next().unwrap_or_else(|| sample.reply(request))).await;
    resolve(&server).await.unwrap();
    assert_eq!(server.requests().len(), 6, "four failures, then manifest and configuration");
}

#[tokio::test]
async fn failures_that_stay_name_the_host_the_thing_and_the_status() {
    type Case = (fn() -> Reply, usize, &'static [&'static str]);
    let cases: [Case; 6] = [
        (|| Reply::Whole(503, String::new(), b"down for\x1b[31m repair".to_vec()), 5, &["503", "5 tries", "down for [31m repair"]),
        (|| Reply::Whole(400, String::new(), Vec::new()), 1, &["400"]),
        (|| Reply::Whole(404, String::new(), Vec::new()), 1, &["no manifest 1 of team/app"]),
        (|| Reply::Whole(401, String::new(), Vec::new()), 1, &["401", "without asking for a login"]),
        (|| Reply::Whole(429, "Retry-After: 3600\r\n".to_owned(), Vec::new()), 1, &["429"]),
        (|| Reply::Hangup, 5, &["no usable answer", "5 times"]),
    ];
    for (reply, tries, parts) in cases {
        let server = Server::start(move |_| reply()).await;
        let message = resolve(&server).await.unwrap_err().to_string();
        for part in parts.iter().chain(&[&*format!("127.0.0.1:{}", server.port), "manifest 1 of team/app"]) {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
        assert_eq!(server.requests().len(), tries, "{message}");
    }
}

#[tokio::test]
async fn an_unreachable_registry_is_named() {
    let dead = testbed::DeadAddress::new().unwrap();
    let error = Source::parse(&format!("{}/app", dead.host()), &Access::default()).unwrap().resolve(&Platform::host()).await.unwrap_err();
    assert!(matches!(&error, OciError::Unreachable { host, .. } if *host == dead.host()), "{error:?}");
}

#[tokio::test]
async fn a_layer_is_resumed_where_the_connection_broke() {
    let sample = Sample::new();
    let (answers, expected) = (sample.clone(), sample.clone());
    let mut breaks = 3;
    let server = Server::start(move |request| {
        if request.path == answers.layer_path() && breaks > 0 {
            breaks -= 1;
            let from = request.range_start();
            let rest = answers.layer[from..].to_vec();
            let status = match from {
                0 => "200 OK".to_owned(),
                _ => format!("206 x\r\nContent-Range: bytes {from}-{}/{}", answers.layer.len() - 1, answers.layer.len()),
            };
            return Reply::Broken(status, rest, 100_000);
        }
        answers.reply(request)
    })
    .await;
    assert_eq!(read_layer(&server, &expected).await.unwrap(), expected.layer);
    let ranges: Vec<Option<String>> = server.log.lock().unwrap().iter().map(|r| r.header("range").map(str::to_owned)).collect();
    assert_eq!(ranges, [None, Some("bytes=100000-".into()), Some("bytes=200000-".into()), Some("bytes=300000-".into())]);
}

#[tokio::test]
async fn a_registry_without_ranges_is_read_again_from_the_start() {
    let sample = Sample::new();
    let expected = sample.clone();
    let mut first = true;
    let server = Server::start(move |_| match std::mem::take(&mut first) {
        true => Reply::Broken("200 OK".to_owned(), sample.layer.clone(), 150_000),
        false => Reply::Unframed(sample.layer.clone()),
    })
    .await;
    assert_eq!(read_layer(&server, &expected).await.unwrap(), expected.layer);
    assert_eq!(server.requests().len(), 2);
}

#[tokio::test]
async fn a_wrong_range_is_refused() {
    let sample = Sample::new();
    let expected = sample.clone();
    let server = Server::start(move |request| match request.range_start() {
        0 => Reply::Broken("200 OK".to_owned(), sample.layer.clone(), 1000),
        _ => Reply::Whole(206, "Content-Range: bytes 5-9/10\r\n".to_owned(), vec![0; 5]),
    })
    .await;
    let error = read_layer(&server, &expected).await.unwrap_err();
    assert!(oci_error(&error).to_string().contains("go on at byte 1000"), "{error}");
}

#[tokio::test]
async fn a_connection_that_always_breaks_without_progress_ends() {
    let sample = Sample::new();
    let expected = sample.clone();
    let server = Server::start(move |request| match request.range_start() {
        0 => Reply::Broken("200 OK".to_owned(), sample.layer.clone(), 1000),
        _ => Reply::Hangup,
    })
    .await;
    let error = read_layer(&server, &expected).await.unwrap_err();
    assert!(matches!(oci_error(&error), OciError::Unreachable { tries: 5, .. }), "{error:?}");
}

#[tokio::test]
async fn truncated_and_altered_layers_are_found() {
    let sample = Sample::new();
    for (change, truncated) in [(200_000usize, true), (800_000, false)] {
        let mut wrong = sample.layer.clone();
        wrong.truncate(change);
        wrong[77] ^= 1;
        let server = Server::start(move |_| Reply::Whole(200, String::new(), wrong.clone())).await;
        let error = read_layer(&server, &sample).await.unwrap_err();
        match VerifyError::of(&error) {
            Some(VerifyError::Truncated { found: 200_000, .. }) if truncated => {}
            Some(VerifyError::Digest { expected, .. }) if !truncated => assert_eq!(*expected, Sha256::of(&sample.layer)),
            _ => panic!("{error:?}"),
        }
    }
}

#[tokio::test]
async fn altered_manifests_and_configurations_are_found() {
    let sample = Sample::new();
    for altered in ["manifest", "blobs"] {
        let answers = sample.clone();
        let server = Server::start(move |request| match answers.reply(request) {
            Reply::Whole(status, headers, mut body) if request.path.contains(altered) => {
                body[20] ^= 1;
                Reply::Whole(status, headers, body)
            }
            reply => reply,
        })
        .await;
        let error = resolve(&server).await.unwrap_err();
        assert!(matches!(error, OciError::Damaged { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn oversized_documents_are_not_read_to_the_end() {
    let server = Server::start(|_| Reply::Whole(200, String::new(), vec![b' '; 5 << 20])).await;
    let message = resolve(&server).await.unwrap_err().to_string();
    assert!(message.contains("larger than 4194304 bytes"), "{message}");
}

#[tokio::test]
async fn tokens_are_fetched_renewed_and_not_sent_elsewhere() {
    let sample = Sample::new();
    let elsewhere_sample = sample.clone();
    let elsewhere = Server::start(move |_| Reply::Whole(200, String::new(), elsewhere_sample.layer.clone())).await;
    let (answers, storage, mut issued) = (sample.clone(), elsewhere.port, 0);
    let port = Arc::new(Mutex::new(0u16));
    let own_port = port.clone();
    let server = Server::start(move |request| {
        if request.path.starts_with("/token?") {
            issued += 1;
            return Reply::Whole(200, String::new(), json!({"token": format!("t{issued}")}).to_string().into_bytes());
        }
        // The first token is for the manifest only: as if it ran out afterwards.
        let wanted = if request.path.contains("manifests") { "Bearer t1" } else { "Bearer t2" };
        if request.header("authorization") != Some(wanted) {
            let realm = format!("http://127.0.0.1:{}/token", own_port.lock().unwrap());
            let challenge = format!("WWW-Authenticate: Bearer realm=\"{realm}\",service=\"reg\",scope=\"repository:team/app:pull\"\r\n");
            return Reply::Whole(401, challenge, Vec::new());
        }
        if request.path == answers.layer_path() {
            return Reply::Whole(307, format!("Location: http://127.0.0.1:{storage}/data\r\n"), Vec::new());
        }
        answers.reply(request)
    })
    .await;
    *port.lock().unwrap() = server.port;
    let source = server.source();
    let image = source.resolve(&Platform::host()).await.unwrap();
    let mut layer = Vec::new();
    source.open_layer(&image.layers[0]).await.unwrap().read_to_end(&mut layer).await.unwrap();
    assert_eq!(layer, sample.layer);
    let tokens: Vec<String> = server.requests().into_iter().filter(|p| p.starts_with("/token")).collect();
    assert_eq!(tokens, ["/token?service=reg&scope=repository%3Ateam%2Fapp%3Apull"; 2]);
    assert_eq!(elsewhere.log.lock().unwrap()[0].header("authorization"), None);
}

#[tokio::test]
async fn a_token_that_does_not_help_is_a_refusal() {
    let server = Server::start(|request| match request.path.starts_with("/token") {
        true => Reply::Whole(200, String::new(), b"{\"access_token\":\"t\"}".to_vec()),
        false => {
            let host = request.header("host").unwrap();
            Reply::Whole(403, format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\"\r\n"), Vec::new())
        }
    })
    .await;
    let error = resolve(&server).await.unwrap_err();
    assert!(matches!(error, OciError::Denied { status: 403, .. }), "{error:?}");
    assert_eq!(server.requests().len(), 3);
}

#[tokio::test]
async fn a_redirect_to_a_dead_host_names_that_host() {
    let dead = testbed::DeadAddress::new().unwrap();
    let location = format!("Location: http://{}/x\r\n", dead.host());
    let server = Server::start(move |_| Reply::Whole(307, location.clone(), Vec::new())).await;
    let error = resolve(&server).await.unwrap_err();
    assert!(matches!(&error, OciError::Unreachable { host, .. } if *host == dead.host()), "{error:?}");
}

#[tokio::test]
async fn a_missing_platform_lists_what_there_is() {
    let entry = |architecture: &str| {
        json!({"mediaType": MANIFEST_TYPE, "digest": Sha256::of(b"").oci(), "size": 0,
        "platform": {"os": "linux", "architecture": architecture}})
    };
    let index = json!({"schemaVersion": 2, "manifests": [entry("s390x"), entry("riscv64")]}).to_string().into_bytes();
    let server = Server::start(move |_| Reply::Whole(200, String::new(), index.clone())).await;
    let error = server.source().resolve(&"linux/ppc64le".parse().unwrap()).await.unwrap_err().to_string();
    for part in ["team/app:1", "linux/ppc64le", "linux/riscv64, linux/s390x", "--platform"] {
        assert!(error.contains(part), "{error}");
    }
}
