//! Logins that other tools keep: Docker's `config.json`, podman's `auth.json`, and the credential helpers they name.
//!
//! Nothing is read and no helper is run before a registry asks who we are.

mod program;
mod secret;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use base64::Engine;

pub use secret::Secret;

/// The key that Docker files the Hub's login under.
const HUB_KEY: &str = "https://index.docker.io/v1/";
/// Names of the Hub in such files; the first is what helpers are asked for.
const HUB_NAMES: [&str; 4] = [HUB_KEY, "index.docker.io", "docker.io", "registry-1.docker.io"];
/// The user name that marks a helper's secret as an identity token (docker-credential-helpers, README).
const TOKEN_USER: &str = "<token>";

/// Who to be at a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Login {
    /// What proves it.
    pub proof: Proof,
    /// File or helper it comes from, for messages.
    pub origin: String,
}

/// What proves an identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proof {
    /// A name and a password.
    Password {
        /// The name.
        user: String,
        /// The password, or an access token in its place.
        password: Secret,
    },
    /// A token to get access tokens for.
    IdentityToken(Secret),
}

impl Login {
    fn new(user: String, secret: Secret, origin: String) -> Login {
        let proof = if user == TOKEN_USER { Proof::IdentityToken(secret) } else { Proof::Password { user, password: secret } };
        Login { proof, origin }
    }

    /// For messages: who, and where that was found.
    pub fn describe(&self) -> String {
        match &self.proof {
            Proof::Password { user, .. } => format!("user {user:?} of {}", self.origin),
            Proof::IdentityToken(_) => format!("the identity token of {}", self.origin),
        }
    }
}

/// What looking for a login came to.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Who to be; without it, anonymous.
    pub login: Option<Login>,
    /// Files and helpers that gave nothing because something is wrong with them, and what. They matter once a registry refuses.
    pub troubles: Vec<String>,
}

/// Where logins are looked for.
#[derive(Clone, Debug, Default)]
pub struct Logins {
    files: Vec<PathBuf>,
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    auths: Option<BTreeMap<String, Entry>>,
    creds_store: Option<String>,
    cred_helpers: Option<BTreeMap<String, String>>,
}

/// Without `Debug`: it holds secrets.
#[derive(serde::Deserialize)]
struct Entry {
    #[serde(default)]
    auth: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    identitytoken: String,
}

impl Logins {
    /// In these files, the first with a fitting entry first; files that are not there are passed over.
    pub fn in_files(files: Vec<PathBuf>) -> Logins {
        Logins { files }
    }

    /// In the files of Docker and podman, as far as the environment tells where they are. `var` reads a variable of it.
    pub fn of_environment(var: impl Fn(&str) -> Option<OsString>) -> Logins {
        let var = |name| var(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = |below: &str| var("HOME").map(|home| home.join(below));
        let run = var("XDG_RUNTIME_DIR").unwrap_or_else(|| format!("/run/containers/{}", rustix::process::getuid().as_raw()).into());
        let run = if run.starts_with("/run/containers") { run } else { run.join("containers") };
        let files = [
            var("REGISTRY_AUTH_FILE"),
            var("DOCKER_CONFIG").or_else(|| home(".docker")).map(|dir| dir.join("config.json")),
            Some(run.join("auth.json")),
            var("XDG_CONFIG_HOME").or_else(|| home(".config")).map(|dir| dir.join("containers/auth.json")),
        ];
        Logins { files: files.into_iter().flatten().collect() }
    }

    /// The files, for messages.
    pub fn places(&self) -> String {
        self.files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", ")
    }

    /// The login for repository `path` of `domain` (`host[:port]`, or `docker.io`).
    pub async fn find(&self, domain: &str, path: &str) -> Found {
        let mut troubles = Vec::new();
        let login = self.look(domain, path, &mut troubles).await;
        for trouble in &troubles {
            tracing::debug!(domain, trouble, "a login could not be had");
        }
        Found { login, troubles }
    }

    async fn look(&self, domain: &str, path: &str, troubles: &mut Vec<String>) -> Option<Login> {
        let names: Vec<&str> = if HUB_NAMES.contains(&domain) { HUB_NAMES.to_vec() } else { vec![domain] };
        for file in &self.files {
            let origin = file.display().to_string();
            let content = match read(file) {
                Ok(Some(content)) => content,
                Ok(None) => continue,
                Err(reason) => {
                    troubles.push(format!("{origin}: {reason}"));
                    continue;
                }
            };
            if let Some((helper, server)) = helper_for(&content, &names, path) {
                match ask(helper, server, &origin).await {
                    Ok(Some(login)) => return Some(login),
                    Ok(None) => {}
                    Err(trouble) => troubles.push(trouble),
                }
            }
            match entry_for(&content, &names, path).map(|entry| entry.login(&origin)).transpose() {
                Ok(Some(Some(login))) => return Some(login),
                Ok(_) => {}
                Err(reason) => troubles.push(format!("{origin}: {reason}")),
            }
        }
        None
    }
}

/// What the helper that `file` names has for `server`, or what is wrong with it.
async fn ask(helper: &str, server: &str, file: &str) -> Result<Option<Login>, String> {
    // A name with a slash would be a path.
    if !helper.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
        return Err(format!("{file}: {helper:?} is no name of a credential helper"));
    }
    let program = format!("docker-credential-{helper}");
    let origin = format!("{program} (named by {file})");
    let answer = program::ask(program.as_ref(), server, program::TIME_LIMIT).await.map_err(|reason| format!("{origin}: {reason}"))?;
    Ok(answer.map(|(user, secret)| Login::new(user, secret, origin)))
}

fn read(path: &Path) -> Result<Option<File>, String> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(None),
        Err(error) => return Err(format!("it cannot be read: {error}")),
    };
    if bytes.trim_ascii().is_empty() {
        return Ok(None);
    }
    // serde_json's own message would quote what it met, which may be a password.
    serde_json::from_slice(&bytes).map(Some).map_err(|e| format!("line {}, column {}: not as expected", e.line(), e.column()))
}

/// The helper to ask, and by which name of the registry.
fn helper_for<'a>(file: &'a File, names: &[&'a str], path: &str) -> Option<(&'a str, &'a str)> {
    let own = best(file.cred_helpers.iter().flatten(), names, path).map(|(key, helper)| (helper.as_str(), key));
    own.or_else(|| file.creds_store.as_deref().map(|store| (store, names[0]))).filter(|(helper, _)| !helper.is_empty())
}

fn entry_for<'a>(file: &'a File, names: &[&str], path: &str) -> Option<&'a Entry> {
    best(file.auths.iter().flatten(), names, path).map(|(_, entry)| entry)
}

/// The entry whose key fits best: podman's keys may name a part of a registry.
fn best<'a, T>(entries: impl Iterator<Item = (&'a String, &'a T)>, names: &[&str], path: &str) -> Option<(&'a str, &'a T)> {
    let fitting = entries.filter_map(|(key, value)| Some((fit(key, names, path)?, key.as_str(), value)));
    fitting.max_by_key(|(length, ..)| *length).map(|(_, key, value)| (key, value))
}

/// How much of `path` the key names, if it is for this registry.
fn fit(key: &str, names: &[&str], path: &str) -> Option<usize> {
    let plain = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let (host, part) = plain.split_once('/').unwrap_or((plain, ""));
    let part = part.trim_end_matches('/');
    if !names.contains(&host) {
        return None;
    }
    match part {
        "" | "v1" | "v2" => Some(0),
        _ => path.strip_prefix(part).filter(|rest| rest.is_empty() || rest.starts_with('/')).map(|_| part.len()),
    }
}

impl Entry {
    fn login(&self, origin: &str) -> Result<Option<Login>, String> {
        if !self.identitytoken.is_empty() {
            return Ok(Some(Login { proof: Proof::IdentityToken(Secret::new(&self.identitytoken)), origin: origin.to_owned() }));
        }
        if self.auth.is_empty() {
            let given = !self.username.is_empty() || !self.password.is_empty();
            return Ok(given.then(|| Login::new(self.username.clone(), Secret::new(&self.password), origin.to_owned())));
        }
        let bad = || "an \"auth\" in it is not the base64 of NAME:PASSWORD".to_owned();
        let decoded = base64::engine::general_purpose::STANDARD.decode(&self.auth).map_err(|_| bad())?;
        let decoded = String::from_utf8(decoded).map_err(|_| bad())?;
        let (user, password) = decoded.split_once(':').ok_or_else(bad)?;
        // Docker pads passwords with NUL bytes (cli/config/configfile, decodeAuth).
        Ok(Some(Login::new(user.to_owned(), Secret::new(password.trim_matches('\0')), origin.to_owned())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn basic(user: &str, password: &str) -> Value {
        json!({"auth": base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"))})
    }

    async fn found(files: &[String], domain: &str, path: &str) -> Result<String, String> {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = (0..files.len()).map(|i| dir.path().join(i.to_string())).collect();
        for (path, text) in paths.iter().zip(files) {
            std::fs::write(path, text).unwrap();
        }
        let logins = Logins::in_files([vec![dir.path().join("absent")], paths].concat());
        let place = |text: String| text.replace(&format!("{}/", dir.path().display()), "");
        let Found { login, troubles } = logins.find(domain, path).await;
        match login {
            None if troubles.is_empty() => Ok("nobody".to_owned()),
            None => Err(place(troubles.join("; "))),
            Some(login) => {
                let secret = match &login.proof {
                    Proof::Password { password, .. } => password.reveal().to_owned(),
                    Proof::IdentityToken(token) => token.reveal().to_owned(),
                };
                // Without the directory, whose random name may well have a secret this short in it.
                let shown = place(format!("{login:?}"));
                assert!(!shown.contains(&secret), "{shown}");
                Ok(place(format!("{} {secret}", login.describe())))
            }
        }
    }

    #[tokio::test]
    async fn the_entry_that_fits_best_is_taken() {
        let docker = json!({"auths": {"https://index.docker.io/v1/": basic("hub", "pw1"), "reg.example.com:5000": basic("reg", "pw2:x"),
            "https://old.example.com/v1/": basic("old", "pw3\0\0"), "empty.example.com": {}, "t.example.com": {"auth": "eDp5", "identitytoken": "pw4"},
            "plain.example.com": {"username": "plain", "password": "pw5"}}})
        .to_string();
        let podman = json!({"auths": {"docker.io/team": basic("team", "pw6"), "docker.io": basic("hub2", "pw7"), "docker.io/te": basic("no", "no"),
            "empty.example.com": basic("second", "pw8")}})
        .to_string();
        for (files, domain, path, expected) in [
            (vec![&docker], "docker.io", "library/debian", "user \"hub\" of 0 pw1"),
            (vec![&podman], "docker.io", "library/debian", "user \"hub2\" of 0 pw7"),
            (vec![&podman], "docker.io", "team/app", "user \"team\" of 0 pw6"),
            (vec![&docker, &podman], "docker.io", "team/app", "user \"hub\" of 0 pw1"),
            (vec![&docker], "reg.example.com:5000", "a", "user \"reg\" of 0 pw2:x"),
            (vec![&docker], "reg.example.com", "a", "nobody"),
            (vec![&docker], "old.example.com", "a", "user \"old\" of 0 pw3"),
            (vec![&docker], "t.example.com", "a", "the identity token of 0 pw4"),
            (vec![&docker], "plain.example.com", "a", "user \"plain\" of 0 pw5"),
            (vec![&docker, &podman], "empty.example.com", "a", "user \"second\" of 1 pw8"),
            (vec![], "docker.io", "a", "nobody"),
        ] {
            let files: Vec<String> = files.into_iter().cloned().collect();
            assert_eq!(found(&files, domain, path).await.as_deref(), Ok(expected), "{domain} {path}");
        }
    }

    #[tokio::test]
    async fn unusable_files_are_named_and_never_quoted() {
        for (text, parts) in [
            ("{\n\"auths\": {\"h.io\": {\"auth\": [\"hunter2\"]}}}".to_owned(), &["line 2"][..]),
            ("{\"auths\": \"hunter2\"}".to_owned(), &["line 1"]),
            ("{".to_owned(), &["line 1"]),
            (json!({"auths": {"h.io": {"auth": "hunter2"}}}).to_string(), &["base64"]),
            (json!({"credHelpers": {"h.io": "../hunter"}}).to_string(), &["../hunter", "no name of a credential helper"]),
            (json!({"credsStore": "nowhere-at-all"}).to_string(), &["docker-credential-nowhere-at-all (named by 0)", "cannot be started"]),
        ] {
            let message = found(std::slice::from_ref(&text), "h.io", "a").await.unwrap_err();
            assert!(!message.contains("hunter2"), "{message}");
            for part in parts.iter().chain(&["0"]) {
                assert!(message.contains(part), "{message:?} lacks {part:?}");
            }
        }
    }

    #[tokio::test]
    async fn a_file_or_helper_that_fails_does_not_hide_the_next_file() {
        let good = json!({"auths": {"h.io": basic("bob", "pw")}}).to_string();
        for bad in ["{".to_owned(), json!({"credsStore": "nowhere-at-all"}).to_string(), json!({"auths": {"h.io": {"auth": "!"}}}).to_string()] {
            assert_eq!(found(&[bad.clone(), good.clone()], "h.io", "a").await.as_deref(), Ok("user \"bob\" of 1 pw"), "{bad}");
        }
    }

    #[test]
    fn helpers_are_asked_for_the_name_docker_uses() {
        let file = |value: Value| -> File { serde_json::from_value(value).unwrap() };
        let both = || file(json!({"credsStore": "store", "credHelpers": {"h.io": "own", "docker.io": "hub"}}));
        assert_eq!(helper_for(&both(), &["h.io"], "a"), Some(("own", "h.io")));
        assert_eq!(helper_for(&both(), &["x.io"], "a"), Some(("store", "x.io")));
        assert_eq!(helper_for(&both(), &HUB_NAMES, "a"), Some(("hub", "docker.io")));
        assert_eq!(helper_for(&file(json!({"credsStore": "store"})), &HUB_NAMES, "a"), Some(("store", HUB_KEY)));
        assert_eq!(helper_for(&file(json!({})), &["x.io"], "a"), None);
    }

    #[test]
    fn files_are_those_of_docker_and_podman() {
        let files =
            |vars: &[(&str, &str)]| Logins::of_environment(|name| vars.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into())).places();
        assert_eq!(
            files(&[("HOME", "/h"), ("XDG_RUNTIME_DIR", "/r")]),
            "/h/.docker/config.json, /r/containers/auth.json, /h/.config/containers/auth.json"
        );
        assert_eq!(
            files(&[("HOME", "/h"), ("XDG_RUNTIME_DIR", "/r"), ("DOCKER_CONFIG", "/d"), ("REGISTRY_AUTH_FILE", "/a"), ("XDG_CONFIG_HOME", "/c")]),
            "/a, /d/config.json, /r/containers/auth.json, /c/containers/auth.json"
        );
    }
}
