//! A certificate authority of a test's own, made with the openssl program, and a server certificate for 127.0.0.1.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::daemon::run;

/// Everything `openssl req` and `x509` need to know, so that the machine's own configuration does not matter.
const CONFIG: &str = "[req]\ndistinguished_name = name\nprompt = no\n[name]\nCN = slipway test\n\
                      [ca]\nbasicConstraints = critical, CA:TRUE\nkeyUsage = critical, keyCertSign\n\
                      [server]\nsubjectAltName = IP:127.0.0.1\nextendedKeyUsage = serverAuth\n";

/// The authority's and the server's files.
#[derive(Debug)]
pub struct TestCa {
    dir: PathBuf,
}

impl TestCa {
    /// Makes keys and certificates in `dir` (made if missing).
    pub fn new(dir: &Path) -> Result<TestCa> {
        fs::create_dir_all(dir)?;
        let file = |name: &str| dir.join(name).display().to_string();
        let (config, ca, ca_key, server, server_key, request) =
            (file("openssl.cnf"), file("ca.crt"), file("ca.key"), file("server.crt"), file("server.key"), file("server.csr"));
        fs::write(&config, CONFIG)?;
        let new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-config", &config];
        run("openssl", [&["req", "-x509", "-days", "2", "-extensions", "ca", "-keyout", &ca_key, "-out", &ca][..], &new_key].concat())?;
        run("openssl", [&["req", "-new", "-keyout", &server_key, "-out", &request][..], &new_key].concat())?;
        let sign = ["x509", "-req", "-days", "2", "-set_serial", "2", "-in", &request, "-CA", &ca, "-CAkey", &ca_key, "-out", &server];
        run("openssl", [&sign[..], &["-extfile", &config, "-extensions", "server"]].concat())?;
        Ok(TestCa { dir: dir.to_owned() })
    }

    /// The authority's certificate, which clients have to believe.
    pub fn ca(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    /// The certificate of a server on 127.0.0.1.
    pub fn server(&self) -> PathBuf {
        self.dir.join("server.crt")
    }

    /// Its key.
    pub fn server_key(&self) -> PathBuf {
        self.dir.join("server.key")
    }
}
