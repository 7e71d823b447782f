//! How registries may be reached: as whom, believing whom, over which hosts.

use std::path::PathBuf;

use super::login::Logins;

/// Where containerd keeps `hosts.toml` files and certificates.
pub const CONTAINERD_CERTS: &str = "/etc/containerd/certs.d";
/// Where Docker keeps certificates.
pub const DOCKER_CERTS: &str = "/etc/docker/certs.d";

/// What a registry client may use. The default is anonymous, with the system's CAs and without mirrors.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// HTTP without TLS also to hosts that are not this machine, logins included.
    pub plain_http: bool,
    /// Files of CA certificates to believe beside the system's.
    pub ca: Vec<PathBuf>,
    /// A directory like [`CONTAINERD_CERTS`], which must be there.
    pub hosts_dir: Option<PathBuf>,
    /// A directory like [`DOCKER_CERTS`].
    pub docker_certs: Option<PathBuf>,
    /// Who to be.
    pub logins: Logins,
}
