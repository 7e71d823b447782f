//! Answering a registry that asks who we are: with name and password, or with a token got for them.

use base64::Engine;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE};
use reqwest::{RequestBuilder, StatusCode, Url};

use super::OciError;
use super::challenge::{Bearer, Challenge};
use super::endpoint::{Endpoint, is_loopback};
use super::login::{Found, Login, Proof, Secret};
use super::tries::{Failure, Tries, origin, read_limited};

/// Largest token answer: tokens are a few KiB.
const MAX_TOKEN: u64 = 1 << 20;
/// How token services know us (distribution `docs/spec/auth/oauth.md`, `client_id`).
const CLIENT_ID: &str = "slipway";

impl Endpoint {
    /// Makes the Authorization header that `challenge` asks for; `tries` says for what.
    pub(super) async fn log_in(&self, challenge: &Challenge, status: StatusCode, tries: &Tries) -> Result<(), OciError> {
        let login = self.login().await.login.as_ref();
        // What a login gets is as secret as the login, and would go to the host with every request.
        let usable = login.filter(|_| self.may_see_logins(&self.0.host.root));
        let header = match challenge {
            Challenge::Bearer(bearer) => format!("Bearer {}", self.token(bearer, usable, tries).await?.reveal()),
            Challenge::Basic => match usable.map(|login| &login.proof) {
                Some(Proof::Password { user, password }) => basic(user, password),
                _ => return Err(tries.denied(status, self.refused())),
            },
        };
        *self.0.authorization.lock().expect("no panic while the header is held") = Some(Secret::new(header));
        Ok(())
    }

    async fn login(&self) -> &Found {
        self.0.login.get_or_init(async || self.0.logins.find(&self.0.host.domain, &self.0.path).await).await
    }

    /// Nobody else can read what is sent there, or the user said that it does not matter.
    fn may_see_logins(&self, url: &Url) -> bool {
        url.scheme() == "https" || self.0.plain_http || is_loopback(url)
    }

    /// For the error of a refusal: as whom we came and what to do.
    pub(super) fn refused(&self) -> String {
        let domain = &self.0.host.domain;
        let log_in = if domain == "docker.io" { "docker login".to_owned() } else { format!("docker login {domain}") };
        let Some(found) = self.0.login.get() else { return "without asking for a login: check the name of the image".to_owned() };
        let text = match &found.login {
            Some(_) if !self.may_see_logins(&self.0.host.root) => self.unsent(),
            Some(login) => {
                let right = if self.0.scopes.is_empty() { "pull" } else { "push to this repository" };
                format!("to {}: is the password still right, and has it the right to {right}? If not, `{log_in}`", login.describe())
            }
            None => {
                let places = self.0.logins.places();
                let places = if places.is_empty() { "was given".to_owned() } else { format!("is in {places}") };
                format!("to the public, and no login for {domain} {places}: check the name of the image, or `{log_in}`")
            }
        };
        found.troubles.iter().fold(text, |text, trouble| format!("{text}; a login could not be had from {trouble}"))
    }

    fn unsent(&self) -> String {
        let who = self.0.login.get().and_then(|found| found.login.as_ref()).map(Login::describe).unwrap_or_default();
        format!("and {who} was not sent, since the connection is not encrypted: use HTTPS or, in a network you trust, --plain-http")
    }

    /// Gets a token (distribution `docs/spec/auth/token.md` and `oauth.md`). An `http` realm is asked only where HTTP is spoken anyway.
    async fn token(&self, challenge: &Bearer, login: Option<&Login>, tries: &Tries) -> Result<Secret, OciError> {
        let malformed = |reason: String| OciError::Malformed { what: format!("the login challenge of {}", self.name()), reason };
        let realm = Url::parse(&challenge.realm).map_err(|e| malformed(format!("realm {:?}: {e}", challenge.realm)))?;
        if !(realm.scheme() == "https" || realm.scheme() == "http" && self.0.host.root.scheme() == "http") {
            return Err(malformed(format!("realm {:?} is not HTTPS", challenge.realm)));
        }
        if login.is_some() && !self.may_see_logins(&realm) {
            return Err(tries.denied(StatusCode::UNAUTHORIZED, self.unsent()));
        }
        let mut tries = Tries::new(&origin(&realm), &format!("a token for {} at {}", self.0.path, self.name()), tries.most);
        let bytes = loop {
            let mut response = match self.token_request(&realm, challenge, login).send().await {
                Ok(response) => response,
                Err(error) => {
                    tries.failed(Failure::Transport(error)).await?;
                    continue;
                }
            };
            let status = response.status();
            // A token service says 400 to an identity token that ran out (RFC 6749 §5.2, invalid_grant).
            let identity = matches!(login, Some(Login { proof: Proof::IdentityToken(_), .. }));
            if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) || identity && status == StatusCode::BAD_REQUEST {
                return Err(tries.denied(status, self.refused()));
            }
            if !status.is_success() {
                let failure = Failure::status(&mut response, false).await;
                tries.failed(failure).await?;
                continue;
            }
            match read_limited(&mut response, MAX_TOKEN).await {
                Ok(bytes) => break bytes.unwrap_or_default(),
                Err(error) => tries.failed(Failure::Transport(error)).await?,
            }
        };
        #[derive(serde::Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let none = || malformed(format!("{} gave no token", origin(&realm)));
        let answer: Answer = serde_json::from_slice(&bytes).map_err(|_| none())?;
        let token = answer.token.or(answer.access_token).filter(|token| !token.is_empty()).ok_or_else(none)?;
        // What is no header value must not get as far as an error that quotes it.
        if token.bytes().all(|b| b.is_ascii_graphic()) { Ok(Secret::new(token)) } else { Err(none()) }
    }

    /// What a token must allow: what the registry asks for and what we know to need.
    fn scopes(&self, challenge: &Bearer) -> Vec<String> {
        let own = &self.0.scopes;
        let Some(asked) = &challenge.scope else {
            return if own.is_empty() { vec![format!("repository:{}:pull", self.0.path)] } else { own.clone() };
        };
        if own.is_empty() {
            return vec![asked.clone()];
        }
        // Ours of a repository allow at least what it asks for there.
        let resource = |scope: &str| scope.rsplit_once(':').map(|(resource, _)| resource.to_owned());
        let others = asked.split(' ').filter(|scope| !scope.is_empty() && own.iter().all(|known| resource(known) != resource(scope)));
        own.iter().cloned().chain(others.map(str::to_owned)).collect()
    }

    fn token_request(&self, realm: &Url, challenge: &Bearer, login: Option<&Login>) -> RequestBuilder {
        let client = if self.is_own(realm) { &self.0.own } else { &self.0.elsewhere };
        let service = challenge.service.iter().map(|service| ("service", service.as_str()));
        let scopes = self.scopes(challenge);
        if let Some(Proof::IdentityToken(token)) = login.map(|login| &login.proof) {
            let scope = scopes.join(" ");
            let asked = service.chain([("scope", scope.as_str())]);
            let own = [("grant_type", "refresh_token"), ("client_id", CLIENT_ID), ("refresh_token", token.reveal())];
            let body = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(asked.chain(own)).finish();
            return client.post(realm.clone()).header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(body);
        }
        let mut url = realm.clone();
        url.query_pairs_mut().extend_pairs(service.chain(scopes.iter().map(|scope| ("scope", scope.as_str()))));
        let request = client.get(url);
        match login.map(|login| &login.proof) {
            Some(Proof::Password { user, password }) => request.header(AUTHORIZATION, basic(user, password)),
            _ => request,
        }
    }
}

fn basic(user: &str, password: &Secret) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{}", password.reveal())))
}
