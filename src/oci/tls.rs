//! HTTP clients: which certificates are believed, which is shown, how long a connection may take to come about.

use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::{Certificate, Client, ClientBuilder, Identity};

use super::OciError;

/// A registry that does not complete a TCP and TLS handshake in this time is down for practical purposes.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest silence within an answer. Registries that fetch from a slower upstream can be silent for several seconds; a dead
/// connection should not hold a conversion for minutes.
const SILENCE_TIMEOUT: Duration = if cfg!(test) { Duration::from_secs(3) } else { Duration::from_secs(30) };

/// Certificates for one host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tls {
    /// Files of CA certificates to believe beside the system's.
    pub ca: Vec<PathBuf>,
    /// Our own certificate and its key, which may be in the same file.
    pub client: Option<(PathBuf, PathBuf)>,
    /// Believe any certificate.
    pub skip_verify: bool,
}

impl Tls {
    /// Something other than the system's CAs was asked for.
    pub fn is_special(&self) -> bool {
        *self != Tls::default()
    }
}

/// The client for a host itself, and the one for where it sends us: there our certificate is not shown and every certificate is checked.
pub(super) fn clients(tls: &Tls, dial_timeout: Option<Duration>, proxy: bool) -> Result<(Client, Client), OciError> {
    patient_clients(tls, dial_timeout, proxy, Some(SILENCE_TIMEOUT))
}

/// [`clients`] for uploads: reqwest counts the time that sending takes as silence, so the caller has to notice a dead connection.
pub(super) fn upload_clients(tls: &Tls, dial_timeout: Option<Duration>, proxy: bool) -> Result<(Client, Client), OciError> {
    patient_clients(tls, dial_timeout, proxy, None)
}

fn patient_clients(tls: &Tls, dial_timeout: Option<Duration>, proxy: bool, silence: Option<Duration>) -> Result<(Client, Client), OciError> {
    let mut roots = Vec::new();
    for path in &tls.ca {
        roots.extend(certificates(path)?);
    }
    let builder = || {
        let mut builder = Client::builder()
            .user_agent(concat!("slipway/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(dial_timeout.unwrap_or(CONNECT_TIMEOUT))
            .redirect(reqwest::redirect::Policy::none());
        if let Some(silence) = silence {
            builder = builder.read_timeout(silence);
        }
        if !roots.is_empty() {
            builder = builder.tls_certs_merge(roots.clone());
        }
        if proxy { builder } else { builder.no_proxy() }
    };
    let build = |builder: ClientBuilder| builder.build().map_err(|source| OciError::Client { source });
    let elsewhere = build(builder())?;
    if tls.client.is_none() && !tls.skip_verify {
        return Ok((elsewhere.clone(), elsewhere));
    }
    let mut own = builder().tls_danger_accept_invalid_certs(tls.skip_verify);
    if let Some((certificate, key)) = &tls.client {
        let mut pem = read(certificate)?;
        if key != certificate {
            pem.push(b'\n');
            pem.extend(read(key)?);
        }
        let identity = Identity::from_pem(&pem).map_err(|e| unusable(certificate, format!("with the key in {}: {e}", key.display())))?;
        own = own.identity(identity);
    }
    Ok((build(own)?, elsewhere))
}

fn certificates(path: &Path) -> Result<Vec<Certificate>, OciError> {
    let found = Certificate::from_pem_bundle(&read(path)?).map_err(|e| unusable(path, e.to_string()))?;
    if found.is_empty() {
        return Err(unusable(path, "there is no certificate in PEM form in it".to_owned()));
    }
    Ok(found)
}

fn read(path: &Path) -> Result<Vec<u8>, OciError> {
    std::fs::read(path).map_err(|e| unusable(path, e.to_string()))
}

fn unusable(path: &Path, reason: String) -> OciError {
    OciError::Certificate { path: path.to_owned(), reason }
}
