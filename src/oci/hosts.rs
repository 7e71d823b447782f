//! Which hosts serve a registry's images: containerd's `hosts.toml` (its `docs/hosts.md`) and the certificate directories of containerd
//! and Docker.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use toml::Spanned;

use super::OciError;
use super::access::Access;
use super::reference::Reference;
use super::tls::Tls;
use super::tries::origin;

/// One host and how to talk to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Host and port, for messages.
    pub name: String,
    /// What it is called in files of logins.
    pub domain: String,
    /// URL of its API, usually `https://host/v2`.
    pub root: Url,
    /// Told to a mirror, which may serve several registries: the one that is meant.
    pub namespace: Option<String>,
    /// It may say which image a tag means.
    pub resolve: bool,
    /// It may give manifests and blobs by digest.
    pub pull: bool,
    /// Certificates.
    pub tls: Tls,
    /// Sent with every request, to this host only.
    pub headers: HeaderMap,
    /// Longest wait for a connection.
    pub dial_timeout: Option<Duration>,
}

/// What `hosts.toml` says of one host; for the registry's own, at the top level. Without `Debug`, as all of the file: headers may be secrets.
#[derive(Default, serde::Deserialize)]
struct Table {
    capabilities: Option<Vec<Spanned<String>>>,
    ca: Option<Words>,
    client: Option<Spanned<Client>>,
    #[serde(default)]
    skip_verify: bool,
    #[serde(default)]
    header: BTreeMap<Spanned<String>, Words>,
    #[serde(default)]
    override_path: bool,
    dial_timeout: Option<Spanned<String>>,
}

#[derive(serde::Deserialize)]
struct Names {
    server: Option<Spanned<String>>,
    #[serde(default)]
    host: BTreeMap<Spanned<String>, Table>,
}

#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Words {
    One(String),
    Many(Vec<String>),
}

/// A file with certificate and key, or several, or pairs of files.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Client {
    One(String),
    Many(Vec<Words>),
}

impl Words {
    fn list(&self) -> &[String] {
        match self {
            Words::One(word) => std::slice::from_ref(word),
            Words::Many(words) => words,
        }
    }
}

/// The hosts for `reference`, in the order to ask them; the last is the registry itself.
pub fn find(reference: &Reference, access: &Access) -> Result<Vec<Host>, OciError> {
    let domain = reference.domain();
    let mut tls = Tls { ca: access.ca.clone(), ..Tls::default() };
    if let Some(dir) = &access.docker_certs {
        add_certificates(&dir.join(domain), &mut tls)?;
    }
    let dir = match &access.hosts_dir {
        Some(root) => host_dir(root, domain).map_err(|(path, reason)| OciError::HostsFile { path, line: None, reason })?,
        None => None,
    };
    let Some(dir) = dir else { return Ok(vec![own_host(reference, access, tls)?]) };
    let path = dir.join("hosts.toml");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(OciError::HostsFile { path, line: None, reason: error.to_string() }),
    };
    // Docker's form of the same directory (containerd, `loadCertFiles`).
    if text.trim().is_empty() {
        add_certificates(&dir, &mut tls)?;
        return Ok(vec![own_host(reference, access, tls)?]);
    }
    parse(&text, &dir, reference, access, tls).map_err(|(span, reason)| {
        let line = span.map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        OciError::HostsFile { path, line, reason }
    })
}

/// The directory for a registry below containerd's (`hostPaths`): with the port as `_port_`, as it is, or the one for all others.
fn host_dir(root: &Path, domain: &str) -> Result<Option<PathBuf>, (PathBuf, String)> {
    let is_dir = |path: &Path| match std::fs::metadata(path) {
        Ok(metadata) => Ok(metadata.is_dir()),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err((path.to_owned(), format!("it cannot be looked at: {error}"))),
    };
    if !is_dir(root)? {
        return Err((root.to_owned(), "there is no such directory of hosts.toml files: check --hosts-dir".to_owned()));
    }
    let port = domain.rsplit_once(':').map(|(host, port)| format!("{host}_{port}_"));
    for name in port.iter().map(String::as_str).chain([domain, "_default"]) {
        let dir = root.join(name);
        if is_dir(&dir)? {
            return Ok(Some(dir));
        }
    }
    Ok(None)
}

fn is_absent(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory)
}

/// CAs (`*.crt`) and our own certificate (`*.cert` and `*.key`) in a directory, which need not exist.
fn add_certificates(dir: &Path, tls: &mut Tls) -> Result<(), OciError> {
    let list = || std::fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect();
    let mut files: Vec<PathBuf> = match list() {
        Ok(files) => files,
        Err(error) if is_absent(&error) => return Ok(()),
        Err(error) => return Err(OciError::Certificate { path: dir.to_owned(), reason: error.to_string() }),
    };
    files.sort();
    for file in files {
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => tls.ca.push(file),
            Some("cert") => {
                let key = file.with_extension("key");
                if !key.is_file() {
                    let reason = format!("its key {} is missing (CA certificates are called .crt)", key.display());
                    return Err(OciError::Certificate { path: file, reason });
                }
                tls.client.get_or_insert((file, key));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The registry itself, as its reference names it. On this machine's own addresses HTTP is plain unless certificates were named for it.
fn own_host(reference: &Reference, access: &Access, tls: Tls) -> Result<Host, OciError> {
    let host = reference.host();
    let plain = access.plain_http || reference.is_loopback() && !tls.is_special() && !host.ends_with(":443");
    let scheme = if plain { "http" } else { "https" };
    let bad = |e: url::ParseError| OciError::BadReference { text: reference.to_string(), reason: e.to_string() };
    let root = Url::parse(&format!("{scheme}://{host}/v2")).map_err(bad)?;
    Ok(Host {
        name: host.to_owned(),
        domain: reference.domain().to_owned(),
        root,
        namespace: None,
        resolve: true,
        pull: true,
        tls,
        headers: HeaderMap::new(),
        dial_timeout: None,
    })
}

/// Where something is wrong, and what.
type Wrong = (Option<Range<usize>>, String);

fn parse(text: &str, dir: &Path, reference: &Reference, access: &Access, own_tls: Tls) -> Result<Vec<Host>, Wrong> {
    // The parser's own message may quote a header, which may be a secret.
    let malformed = |e: toml::de::Error| (e.span(), "this is not TOML, or not what a hosts.toml has there".to_owned());
    let names: Names = toml::from_str(text).map_err(malformed)?;
    let own: Table = toml::from_str(text).map_err(malformed)?;
    let mut tables: Vec<(Spanned<String>, Table)> = names.host.into_iter().collect();
    tables.sort_by_key(|(name, _)| name.span().start);
    let mut hosts = Vec::new();
    for (name, table) in &tables {
        let mut tls = Tls { ca: access.ca.clone(), ..Tls::default() };
        table.add_tls(dir, &mut tls)?;
        hosts.push(table.host(root(name, table)?, reference, tls)?);
    }
    let server = names.server.as_ref().filter(|server| !server.get_ref().is_empty()).map(|server| root(server, &own)).transpose()?;
    // What other files have for the registry is not for whatever host stands in for it.
    let mut tls = match &server {
        Some(root) if !is_registry(root, reference) => Tls { ca: access.ca.clone(), ..Tls::default() },
        _ => own_tls,
    };
    own.add_tls(dir, &mut tls)?;
    let is_named = server.is_some();
    let root = match server {
        Some(root) => root,
        None => own_host(reference, access, tls.clone()).map_err(|e| (None, e.to_string()))?.root,
    };
    let mut last = own.host(root, reference, tls)?;
    if !is_named {
        // As containerd does: capabilities at the top are those of `server`.
        (last.resolve, last.pull) = (true, true);
    }
    hosts.push(last);
    Ok(hosts)
}

/// The URL of a host's API.
fn root(name: &Spanned<String>, table: &Table) -> Result<Url, Wrong> {
    let text = name.get_ref();
    let full = if text.starts_with("http") { text.clone() } else { format!("https://{text}") };
    // What is before an @ may be a password.
    let shown = if text.contains('@') { "this".to_owned() } else { format!("{text:?}") };
    let wrong = |reason: String| (Some(name.span()), format!("{shown} is no host: {reason}"));
    let mut url = Url::parse(&full).map_err(|e| wrong(e.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(wrong("expected https://HOST[:PORT] or http://HOST[:PORT]".to_owned()));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong("name and password do not belong into it: use `docker login`".to_owned()));
    }
    let path = url.path().trim_end_matches('/').to_owned();
    url.set_path(&if table.override_path || path.ends_with("/v2") { path } else { format!("{path}/v2") });
    Ok(url)
}

/// The registry itself, as its reference names it.
fn is_registry(root: &Url, reference: &Reference) -> bool {
    origin(root) == reference.host().trim_end_matches(":443")
}

impl Table {
    /// `tls` is complete.
    fn host(&self, root: Url, reference: &Reference, tls: Tls) -> Result<Host, Wrong> {
        let name = origin(&root);
        let is_registry = is_registry(&root, reference);
        let (mut resolve, mut pull) = (false, false);
        for capability in self.capabilities.iter().flatten() {
            match capability.get_ref().to_lowercase().as_str() {
                "pull" => pull = true,
                "resolve" => resolve = true,
                "push" => {}
                other => return Err((Some(capability.span()), format!("{other:?} is no capability: expected pull, resolve or push"))),
            }
        }
        if self.capabilities.as_ref().is_none_or(Vec::is_empty) {
            (resolve, pull) = (true, true);
        }
        Ok(Host {
            domain: if is_registry { reference.domain().to_owned() } else { name.clone() },
            namespace: (!is_registry).then(|| reference.domain().to_owned()),
            name,
            root,
            resolve,
            pull,
            tls,
            headers: self.headers()?,
            dial_timeout: self
                .dial_timeout
                .as_ref()
                .map(|text| duration(text.get_ref()).map_err(|reason| (Some(text.span()), reason)))
                .transpose()?,
        })
    }

    fn add_tls(&self, dir: &Path, tls: &mut Tls) -> Result<(), Wrong> {
        let ca = self.ca.iter().flat_map(Words::list).map(|file| dir.join(file));
        tls.ca.extend(ca);
        tls.skip_verify |= self.skip_verify;
        let Some(client) = &self.client else { return Ok(()) };
        let wrong = |reason: &str| (Some(client.span()), reason.to_owned());
        let pairs = match client.get_ref() {
            Client::One(file) => vec![std::slice::from_ref(file)],
            Client::Many(pairs) => pairs.iter().map(Words::list).collect(),
        };
        tls.client = match pairs[..] {
            [] => None,
            [[file]] => Some((dir.join(file), dir.join(file))),
            [[certificate, key]] => Some((dir.join(certificate), dir.join(key))),
            [_] => return Err(wrong("client: expected a file, or a pair of certificate and key file")),
            _ => return Err(wrong("client: several certificates for one host are not supported, name one")),
        };
        Ok(())
    }

    fn headers(&self) -> Result<HeaderMap, Wrong> {
        let mut headers = HeaderMap::new();
        for (name, values) in &self.header {
            let wrong = || (Some(name.span()), "this name or its value cannot be an HTTP header".to_owned());
            let parsed: HeaderName = name.get_ref().parse().map_err(|_| wrong())?;
            for value in values.list() {
                let mut value = HeaderValue::from_str(value).map_err(|_| wrong())?;
                value.set_sensitive(true);
                headers.append(&parsed, value);
            }
        }
        Ok(headers)
    }
}

/// A duration as Go writes it: `30s`, `1m30s`, `500ms`.
fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("{text:?} is no duration: expected something like 30s or 1m30s");
    let mut seconds = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let (number, after) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(bad)?);
        let (unit, after) = after.split_at(after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len()));
        let factor = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return Err(bad()),
        };
        seconds += number.parse::<f64>().map_err(|_| bad())? * factor;
        rest = after;
    }
    Duration::try_from_secs_f64(seconds).ok().filter(|duration| !duration.is_zero()).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(reference: &str, file: &str, access: Access) -> Result<Vec<Host>, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("_default")).unwrap();
        std::fs::write(dir.path().join("_default/hosts.toml"), file).unwrap();
        let access = Access { hosts_dir: Some(dir.path().to_owned()), ..access };
        let here = format!("{}/_default", dir.path().display());
        let hosts = find(&reference.parse().unwrap(), &access).map_err(|e| e.to_string().replace(&here, "DIR"))?;
        let short = |path: &PathBuf| PathBuf::from(path.display().to_string().replace(&here, "DIR"));
        let tls = |tls: Tls| Tls { ca: tls.ca.iter().map(short).collect(), client: tls.client.map(|(a, b)| (short(&a), short(&b))), ..tls };
        Ok(hosts.into_iter().map(|host| Host { tls: tls(host.tls.clone()), ..host }).collect())
    }

    fn roots(hosts: &[Host]) -> Vec<String> {
        hosts
            .iter()
            .map(|host| format!("{} {} {}", host.root, if host.resolve { "resolve" } else { "-" }, if host.pull { "pull" } else { "-" }))
            .collect()
    }

    #[test]
    fn hosts_come_in_the_order_of_the_file_and_the_registry_last() {
        for (reference, file, expected) in [
            ("reg.io/a", "", &["https://reg.io/v2 resolve pull"][..]),
            ("debian", "server = \"https://registry-1.docker.io\"", &["https://registry-1.docker.io/v2 resolve pull"]),
            (
                "reg.io:5000/a",
                "[host.\"https://z.io\"]\ncapabilities = [\"pull\"]\n[host.\"http://a.io:81/x/\"]\n[host.\"b.io\"]\ncapabilities = [\"resolve\", \"push\"]",
                &["https://z.io/v2 - pull", "http://a.io:81/x/v2 resolve pull", "https://b.io/v2 resolve -", "https://reg.io:5000/v2 resolve pull"],
            ),
            (
                "reg.io/a",
                "server = \"https://own.io/v2\"\ncapabilities = [\"Pull\"]\n[host.\"https://m.io/up/reg\"]\noverride_path = true",
                &["https://m.io/up/reg resolve pull", "https://own.io/v2 - pull"],
            ),
            ("reg.io/a", "capabilities = [\"push\"]", &["https://reg.io/v2 resolve pull"]),
            ("127.0.0.1:5000/a", "[host.\"http://m.io\"]", &["http://m.io/v2 resolve pull", "http://127.0.0.1:5000/v2 resolve pull"]),
            ("127.0.0.1:5000/a", "ca = \"x.crt\"", &["https://127.0.0.1:5000/v2 resolve pull"]),
        ] {
            assert_eq!(roots(&found(reference, file, Access::default()).unwrap()), expected, "{file}");
        }
    }

    #[test]
    fn a_host_has_its_own_certificates_headers_and_timeout() {
        let file = "ca = [\"own.crt\", \"/abs.crt\"]\nclient = \"both.pem\"\n[host.\"https://m.io\"]\nca = \"m.crt\"\nclient = [[\"m.cert\", \"m.key\"]]\n\
                    skip_verify = true\ndial_timeout = \"1m0.5s\"\n[host.\"https://m.io\".header]\nx-one = \"1\"\nx-two = [\"2\", \"3\"]";
        let hosts = found("docker.io/a", file, Access { ca: vec!["/cli.crt".into()], ..Access::default() }).unwrap();
        let pair = |a: &str, b: &str| Some((a.into(), b.into()));
        assert_eq!(hosts[0].tls, Tls { ca: vec!["/cli.crt".into(), "DIR/m.crt".into()], client: pair("DIR/m.cert", "DIR/m.key"), skip_verify: true });
        let own = Tls {
            ca: vec!["/cli.crt".into(), "DIR/own.crt".into(), "/abs.crt".into()],
            client: pair("DIR/both.pem", "DIR/both.pem"),
            skip_verify: false,
        };
        assert_eq!(hosts[1].tls, own);
        assert_eq!((hosts[0].headers.len(), hosts[0].dial_timeout), (3, Some(Duration::from_millis(60_500))));
        assert!(!format!("{:?}", hosts[0]).contains("\"1\""), "headers may be secrets");
        assert_eq!((hosts[0].namespace.as_deref(), hosts[0].domain.as_str()), (Some("docker.io"), "m.io"));
        assert_eq!((hosts[1].namespace.as_deref(), hosts[1].domain.as_str()), (None, "docker.io"));
        assert!(hosts[1].headers.is_empty());
    }

    #[test]
    fn mistakes_name_file_and_line() {
        for (file, parts) in [
            ("\nserver = \"https://x.io\"\nca = 7", &["DIR/hosts.toml, line 3"][..]),
            ("server = ", &["line 1"]),
            ("\n\ncapabilities = [\"pull\",\n \"fly\"]", &["line 4", "\"fly\"", "resolve"]),
            ("[host.\"https://\"]", &["line 1", "\"https://\" is no host"]),
            ("[host.\"httpx://a\"]", &["line 1", "expected https://"]),
            ("\n[host.\"https://a\"]\ndial_timeout = \"5\"", &["line 3", "\"5\" is no duration"]),
            ("client = [[\"a\", \"b\"], [\"c\", \"d\"]]", &["line 1", "several certificates"]),
            ("[header]\n\"a b\" = \"hunter2\"", &["line 2", "cannot be an HTTP header"]),
            ("[header]\na = { b = \"hunter2\" }", &["line 2"]),
            ("\nheader = \"Authorization: Bearer hunter2\"", &["line 2", "not what a hosts.toml has"]),
            ("[header]\n\"Authorization: hunter2\" = \"\"", &["line 2"]),
            ("server = \"https://bob:hunter2@reg.io\"", &["line 1", "docker login"]),
            ("[host.\"https://bob:hunter2@re g.io\"]", &["line 1", "is no host"]),
        ] {
            let message = found("reg.io/a", file, Access::default()).unwrap_err();
            assert!(!message.contains("hunter2"), "{message}");
            for part in parts {
                assert!(message.contains(part), "{message:?} lacks {part:?}");
            }
        }
    }

    #[test]
    fn the_directory_of_a_registry_is_found_under_every_name_containerd_knows() {
        let dir = tempfile::tempdir().unwrap();
        let find = |domain: &str| host_dir(dir.path(), domain).unwrap().map(|found| found.file_name().unwrap().to_str().unwrap().to_owned());
        assert_eq!(find("reg.io:5000"), None);
        for (name, domain) in
            [("_default", "reg.io:5000"), ("reg.io:5000", "reg.io:5000"), ("reg.io_5000_", "reg.io:5000"), ("docker.io", "docker.io")]
        {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            assert_eq!(find(domain).as_deref(), Some(name));
        }
        assert_eq!(find("other.io").as_deref(), Some("_default"));
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        for path in ["/nowhere/certs.d", "/dev/null"] {
            let access = Access { hosts_dir: Some(path.into()), ..Access::default() };
            let message = find(&"reg.io/a".parse().unwrap(), &access).unwrap_err().to_string();
            assert!(message.contains(path) && message.contains("--hosts-dir"), "{message}");
        }
    }

    #[test]
    fn certificates_for_the_registry_are_not_for_a_server_of_another_name() {
        let docker = tempfile::tempdir().unwrap();
        std::fs::create_dir(docker.path().join("reg.io")).unwrap();
        for file in ["a.crt", "b.cert", "b.key"] {
            std::fs::write(docker.path().join("reg.io").join(file), "").unwrap();
        }
        for (server, is_own) in
            [("https://reg.io", true), ("https://reg.io:443/v2", true), ("https://reg.io:5000", false), ("https://evil.io", false)]
        {
            let access = Access { ca: vec!["/cli.crt".into()], docker_certs: Some(docker.path().to_owned()), ..Access::default() };
            let hosts = found("reg.io/a", &format!("server = \"{server}\"\nca = \"s.crt\""), access).unwrap();
            assert_eq!((hosts[0].tls.client.is_some(), hosts[0].tls.ca.len()), (is_own, if is_own { 3 } else { 2 }), "{server}");
        }
    }

    #[test]
    fn certificates_of_docker_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("127.0.0.1:5000");
        std::fs::create_dir(&at).unwrap();
        let access = Access { docker_certs: Some(dir.path().to_owned()), ..Access::default() };
        let hosts = || find(&"127.0.0.1:5000/a".parse().unwrap(), &access);
        assert_eq!(roots(&hosts().unwrap()), ["http://127.0.0.1:5000/v2 resolve pull"]);
        for file in ["b.crt", "a.crt", "c.cert"] {
            std::fs::write(at.join(file), "").unwrap();
        }
        let message = hosts().unwrap_err().to_string();
        assert!(message.contains("c.cert") && message.contains("c.key is missing"), "{message}");
        std::fs::write(at.join("c.key"), "").unwrap();
        let hosts = hosts().unwrap();
        assert_eq!(roots(&hosts), ["https://127.0.0.1:5000/v2 resolve pull"]);
        assert_eq!(hosts[0].tls.ca, [at.join("a.crt"), at.join("b.crt")]);
        assert_eq!(hosts[0].tls.client, Some((at.join("c.cert"), at.join("c.key"))));
    }
}
