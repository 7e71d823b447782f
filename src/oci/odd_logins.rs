//! Tests of logging in, against registries and token services that are scripts on 127.0.0.1.

use std::sync::{Arc, Mutex};

use base64::Engine;
use serde_json::{Value, json};

use super::odd_registry::{Reply, Request, Sample, Server, read_layer_of};
use super::{Access, Logins, OciError, Platform, Source};

/// What a request with this name and password carries.
fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")))
}

/// Access with a file of logins that has one entry for `host`.
fn access(dir: &tempfile::TempDir, host: &str, entry: Value) -> Access {
    let file = dir.path().join("config.json");
    std::fs::write(&file, json!({"auths": {host: entry}}).to_string()).unwrap();
    Access { logins: Logins::in_files(vec![file]), ..Access::default() }
}

fn password(user: &str, password: &str) -> Value {
    json!({"auth": base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"))})
}

fn unauthorized(challenge: String) -> Reply {
    Reply::Whole(401, format!("WWW-Authenticate: {challenge}\r\n"), Vec::new())
}

fn token(text: &str) -> Reply {
    Reply::Whole(200, String::new(), json!({"token": text}).to_string().into_bytes())
}

/// A registry that wants bearer tokens of itself at `/token`, and asks `issue` for each.
async fn token_registry(
    sample: &Sample,
    mut issue: impl FnMut(&Request) -> Reply + Send + 'static,
    mut accepts: impl FnMut(&Request) -> bool + Send + 'static,
) -> Server {
    let answers = sample.clone();
    Server::start(move |request| {
        if request.path.starts_with("/token") {
            return issue(request);
        }
        if !accepts(request) {
            let host = request.header("host").unwrap();
            return unauthorized(format!("Bearer realm=\"http://{host}/token\",service=\"reg\",scope=\"repository:team/app:pull\""));
        }
        answers.reply(request)
    })
    .await
}

#[tokio::test]
async fn name_and_password_are_sent_when_asked_for_and_never_to_storage() {
    let (sample, dir) = (Sample::new(), tempfile::tempdir().unwrap());
    let stored = sample.clone();
    let storage = Server::start(move |_| Reply::Whole(200, String::new(), stored.layer.clone())).await;
    let (answers, port) = (sample.clone(), storage.port);
    let server = Server::start(move |request| match request.header("authorization") {
        Some(header) if header == basic("bob", "hunter2") => match request.path == answers.layer_path() {
            true => Reply::Whole(307, format!("Location: http://127.0.0.1:{port}/data\r\n"), Vec::new()),
            false => answers.reply(request),
        },
        _ => unauthorized("Basic realm=\"reg\"".to_owned()),
    })
    .await;
    let source = server.source_with(&access(&dir, &format!("127.0.0.1:{}", server.port), password("bob", "hunter2")));
    source.resolve(&Platform::host()).await.unwrap();
    assert_eq!(read_layer_of(&source, &sample).await.unwrap(), sample.layer);
    assert_eq!(server.requests().len(), 4, "one refusal, then manifest, configuration and layer with the login");
    assert_eq!(storage.log.lock().unwrap()[0].header("authorization"), None);
    assert!(!format!("{source:?}").contains("hunter2"));
}

#[tokio::test]
async fn a_wrong_password_names_the_registry_the_user_and_the_file_but_not_the_password() {
    for bearer in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(move |request| match request.path.starts_with("/token") {
            true => Reply::Whole(401, String::new(), Vec::new()),
            false => {
                let host = request.header("host").unwrap();
                unauthorized(if bearer { format!("Bearer realm=\"http://{host}/token\"") } else { "Basic realm=x".to_owned() })
            }
        })
        .await;
        let host = format!("127.0.0.1:{}", server.port);
        let error = server.source_with(&access(&dir, &host, password("bob", "hunter2"))).resolve(&Platform::host()).await.unwrap_err();
        assert!(matches!(error, OciError::Denied { status: 401, .. }), "{error:?}");
        let text = format!("{error} {error:?}");
        for part in [&*host, "\"bob\"", "config.json", &format!("docker login {host}")] {
            assert!(text.contains(part), "{text} lacks {part}");
        }
        assert!(!text.contains("hunter2") && !text.contains(&basic("bob", "hunter2")[6..]), "{text}");
    }
}

#[tokio::test]
async fn without_a_login_the_error_says_where_one_was_looked_for() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(|_| unauthorized("Basic realm=x".to_owned())).await;
    let error = server.source_with(&access(&dir, "other.example.com", password("a", "b"))).resolve(&Platform::host()).await.unwrap_err();
    let text = error.to_string();
    for part in ["no login for 127.0.0.1", "config.json", "docker login"] {
        assert!(text.contains(part), "{text} lacks {part}");
    }
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn a_password_gets_a_token_from_the_realm_with_the_scope_asked_for() {
    let (sample, dir) = (Sample::new(), tempfile::tempdir().unwrap());
    let issue = |request: &Request| {
        if request.header("authorization") == Some(&basic("bob", "pw")) { token("t") } else { Reply::Whole(401, String::new(), vec![]) }
    };
    let server = token_registry(&sample, issue, |request| request.header("authorization") == Some("Bearer t")).await;
    let source = server.source_with(&access(&dir, &format!("127.0.0.1:{}", server.port), password("bob", "pw")));
    source.resolve(&Platform::host()).await.unwrap();
    let log = server.log.lock().unwrap();
    let asked = log.iter().find(|request| request.path.starts_with("/token")).unwrap();
    assert_eq!((asked.method.as_str(), asked.path.as_str()), ("GET", "/token?service=reg&scope=repository%3Ateam%2Fapp%3Apull"));
}

#[tokio::test]
async fn an_identity_token_is_exchanged_by_post() {
    let (sample, dir) = (Sample::new(), tempfile::tempdir().unwrap());
    let issue = |_: &Request| Reply::Whole(200, String::new(), b"{\"access_token\":\"t\"}".to_vec());
    let server = token_registry(&sample, issue, |request| request.header("authorization") == Some("Bearer t")).await;
    let source = server.source_with(&access(&dir, &format!("127.0.0.1:{}", server.port), json!({"identitytoken": "id+1"})));
    source.resolve(&Platform::host()).await.unwrap();
    let log = server.log.lock().unwrap();
    let asked = log.iter().find(|request| request.path.starts_with("/token")).unwrap();
    assert_eq!((asked.method.as_str(), asked.path.as_str()), ("POST", "/token"));
    assert_eq!(asked.header("content-type"), Some("application/x-www-form-urlencoded"));
    let body = "service=reg&scope=repository%3Ateam%2Fapp%3Apull&grant_type=refresh_token&client_id=slipway&refresh_token=id%2B1";
    assert_eq!(asked.body, body);
    assert_eq!(asked.header("authorization"), None);
}

#[tokio::test]
async fn an_identity_token_that_ran_out_is_a_refusal() {
    let (sample, dir) = (Sample::new(), tempfile::tempdir().unwrap());
    let server = token_registry(&sample, |_| Reply::Whole(400, String::new(), b"{\"error\":\"invalid_grant\"}".to_vec()), |_| false).await;
    let source = server.source_with(&access(&dir, &format!("127.0.0.1:{}", server.port), json!({"identitytoken": "id"})));
    let text = source.resolve(&Platform::host()).await.unwrap_err().to_string();
    assert!(text.contains("the identity token of") && text.contains("docker login"), "{text}");
}

#[tokio::test]
async fn a_token_that_runs_out_within_a_layer_is_renewed_and_the_layer_resumed() {
    let sample = Sample::new();
    let issued = Arc::new(Mutex::new(0));
    let (count, valid) = (issued.clone(), issued.clone());
    let (answers, mut served) = (sample.clone(), 0);
    // Every token is good for one connection that breaks after 300 kB.
    let server = Server::start(move |request| {
        if request.path.starts_with("/token") {
            *count.lock().unwrap() += 1;
            served = 0;
            return token(&format!("t{}", count.lock().unwrap()));
        }
        if served == 1 || request.header("authorization") != Some(&*format!("Bearer t{}", valid.lock().unwrap())) {
            return unauthorized(format!("Bearer realm=\"http://{}/token\"", request.header("host").unwrap()));
        }
        served = 1;
        let from = request.range_start();
        let status = match from {
            0 => "200 OK".to_owned(),
            _ => format!("206 x\r\nContent-Range: bytes {from}-{}/{}", answers.layer.len() - 1, answers.layer.len()),
        };
        let rest = answers.layer[from..].to_vec();
        let sent = rest.len().min(300_000);
        Reply::Broken(status, rest, sent)
    })
    .await;
    assert_eq!(read_layer_of(&server.source_with(&Access::default()), &sample).await.unwrap(), sample.layer);
    assert_eq!(*issued.lock().unwrap(), 3);
    let log = server.log.lock().unwrap();
    let ranges: Vec<&str> = log.iter().filter(|r| r.header("authorization").is_some()).filter_map(|r| r.header("range")).collect();
    // Each range twice: with the old token and with the new one.
    assert_eq!(ranges, ["bytes=300000-", "bytes=300000-", "bytes=600000-", "bytes=600000-"]);
}

#[tokio::test]
async fn logins_do_not_travel_unencrypted_to_other_machines() {
    let dir = tempfile::tempdir().unwrap();
    // The name of a test network (RFC 5737): nothing is ever sent there.
    let server = Server::start(|_| unauthorized("Bearer realm=\"http://192.0.2.1/token\"".to_owned())).await;
    let source = server.source_with(&access(&dir, &format!("127.0.0.1:{}", server.port), password("bob", "hunter2")));
    let text = source.resolve(&Platform::host()).await.unwrap_err().to_string();
    assert!(text.contains("was not sent") && text.contains("--plain-http") && !text.contains("hunter2"), "{text}");
}

#[tokio::test]
async fn a_host_that_may_not_see_logins_gets_a_token_of_nobody() {
    for open in [true, false] {
        let (sample, dir) = (Sample::new(), tempfile::tempdir().unwrap());
        let answers = sample.clone();
        // Loopback all the same, but not by its name.
        let server = Server::start(move |request| {
            let host = request.header("host").unwrap();
            match request.header("authorization") {
                None if request.path.starts_with("/token") => token("public"),
                Some("Bearer public") if open => answers.reply(request),
                _ => unauthorized(format!("Bearer realm=\"http://127.0.0.1:{}/token\"", host.rsplit_once(':').unwrap().1)),
            }
        })
        .await;
        let host = format!("0.0.0.0:{}", server.port);
        let at = dir.path().join(format!("0.0.0.0_{}_", server.port));
        std::fs::create_dir(&at).unwrap();
        std::fs::write(at.join("hosts.toml"), format!("server = \"http://{host}\"")).unwrap();
        let access = Access { hosts_dir: Some(dir.path().to_owned()), ..access(&dir, &host, password("bob", "hunter2")) };
        let resolved = Source::parse(&format!("{host}/team/app:1"), &access).unwrap().resolve(&Platform::host()).await;
        match open {
            true => drop(resolved.unwrap()),
            false => {
                let text = resolved.unwrap_err().to_string();
                assert!(text.contains("was not sent") && text.contains("--plain-http") && !text.contains("hunter2"), "{text}");
            }
        }
        let sent: Vec<_> = server.log.lock().unwrap().iter().filter_map(|r| r.header("authorization").map(str::to_owned)).collect();
        assert!(sent.iter().all(|header| header == "Bearer public"), "{sent:?}");
    }
}

#[tokio::test]
async fn logins_that_cannot_be_had_matter_only_when_anonymous_does_not_do() {
    let (sample, dir) = (Sample::new(), tempfile::tempdir().unwrap());
    let file = dir.path().join("config.json");
    let access = Access { logins: Logins::in_files(vec![file.clone()]), ..Access::default() };
    for (content, reason) in
        [("{\n\"credsStore\": 7}", "config.json: line 2"), ("{\"credsStore\": \"nowhere\"}", "docker-credential-nowhere (named by")]
    {
        std::fs::write(&file, content).unwrap();
        let public = token_registry(&sample, |_| token("t"), |request| request.header("authorization") == Some("Bearer t")).await;
        public.source_with(&access).resolve(&Platform::host()).await.unwrap();
        let closed = Server::start(|_| unauthorized("Basic realm=x".to_owned())).await;
        let error = closed.source_with(&access).resolve(&Platform::host()).await.unwrap_err();
        assert!(matches!(error, OciError::Denied { .. }), "{error:?}");
        assert!(error.to_string().contains(reason), "{error}");
    }
}
