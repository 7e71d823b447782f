//! Image references as Docker and containerd write them, normalised.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use super::OciError;
use super::digest::Sha256;

/// Where references without a host lead, and the host that serves them (the name differs for historical reasons).
const DEFAULT_DOMAIN: &str = "docker.io";
const DEFAULT_DOMAIN_HOST: &str = "registry-1.docker.io";
/// Longest path (distribution `reference/reference.go`, `RepositoryNameTotalLengthMax`).
const MAX_PATH: usize = 255;
/// Longest tag (distribution-spec, "Pulling manifests").
const MAX_TAG: usize = 128;

/// An image in a registry: `host[:port]/path[:tag][@sha256:digest]`. Displayed in full, with the host and with a tag or digest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    domain: String,
    path: String,
    tag: Option<String>,
    digest: Option<Sha256>,
}

impl Reference {
    /// Host and optional port as written (`docker.io` if none was).
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Host and optional port to connect to.
    pub fn host(&self) -> &str {
        if self.domain == DEFAULT_DOMAIN { DEFAULT_DOMAIN_HOST } else { &self.domain }
    }

    /// Repository within the registry.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The tag, if there is one.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if the reference is pinned to one.
    pub fn digest(&self) -> Option<Sha256> {
        self.digest
    }

    /// What to ask the registry for: the digest if there is one, else the tag.
    pub fn target(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.oci(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => unreachable!("parsing gives every reference a tag or a digest"),
        }
    }

    /// The registry is on this machine, where nobody can listen in: plain HTTP is allowed, as in Docker and containerd.
    pub fn is_loopback(&self) -> bool {
        let host = match self.domain.strip_prefix('[') {
            Some(v6) => v6.split(']').next().unwrap_or(v6),
            None => self.domain.split(':').next().unwrap_or(&self.domain),
        };
        host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.domain, self.path)?;
        self.tag.iter().try_for_each(|tag| write!(f, ":{tag}"))?;
        self.digest.iter().try_for_each(|digest| write!(f, "@{}", digest.oci()))
    }
}

impl FromStr for Reference {
    type Err = OciError;

    /// Follows distribution's `reference/normalize.go`: a first component with a dot, a colon or an upper-case letter, or
    /// `localhost`, is a host; without one it is Docker Hub's; a single component there is in `library/`; no tag and no digest
    /// means `latest`.
    fn from_str(text: &str) -> Result<Self, OciError> {
        let bad = |reason: &str| OciError::BadReference { text: text.to_owned(), reason: reason.to_owned() };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) if digest.starts_with("sha256:") => {
                (rest, Some(digest.parse().map_err(|_| bad("after @ expected sha256: and 64 lowercase hex digits"))?))
            }
            Some(_) => return Err(bad("after @ expected sha256: and 64 lowercase hex digits")),
            None => (text, None),
        };
        let (domain, rest) = match rest.split_once('/') {
            Some((first, rest)) if is_host(first) => (first, rest),
            _ => (DEFAULT_DOMAIN, rest),
        };
        let domain = if domain == "index.docker.io" { DEFAULT_DOMAIN } else { domain };
        let (path, tag) = match rest.split_once(':') {
            Some((path, tag)) => (path, Some(tag)),
            None => (rest, None),
        };
        check_domain(domain).map_err(bad)?;
        check_path(path).map_err(bad)?;
        tag.map_or(Ok(()), check_tag).map_err(bad)?;
        let library = domain == DEFAULT_DOMAIN && !path.contains('/');
        Ok(Reference {
            domain: domain.to_owned(),
            path: if library { format!("library/{path}") } else { path.to_owned() },
            tag: tag.map(str::to_owned).or_else(|| digest.is_none().then(|| "latest".to_owned())),
            digest,
        })
    }
}

fn is_host(first: &str) -> bool {
    first == "localhost" || first.contains(['.', ':']) || first.starts_with('[') || first.bytes().any(|b| b.is_ascii_uppercase())
}

/// `host[:port]`, where host is a DNS name or an IPv6 address in brackets.
fn check_domain(domain: &str) -> Result<(), &'static str> {
    let (host, port) = match domain.strip_prefix('[') {
        Some(v6) => {
            let (address, rest) = v6.split_once(']').ok_or("the host has [ without ]")?;
            address.parse::<std::net::Ipv6Addr>().map_err(|_| "between [ and ] expected an IPv6 address")?;
            match rest.strip_prefix(':') {
                Some(port) => (None, Some(port)),
                None if rest.is_empty() => (None, None),
                None => return Err("after ] expected a colon and a port"),
            }
        }
        None => match domain.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(domain), None),
        },
    };
    let label_ok = |label: &str| {
        !label.is_empty() && !label.starts_with('-') && !label.ends_with('-') && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if !host.is_none_or(|host| host.split('.').all(label_ok)) {
        return Err("the host may have letters, digits, dots and inner hyphens");
    }
    if !port.is_none_or(|port| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|p| p > 0)) {
        return Err("the port must be a number from 1 to 65535");
    }
    Ok(())
}

/// Components of lower-case letters and digits, joined inside by `.`, `_`, `__` or hyphens, separated by `/`.
fn check_path(path: &str) -> Result<(), &'static str> {
    if path.is_empty() {
        return Err("the repository name is missing");
    }
    if path.len() > MAX_PATH {
        return Err("the repository name is longer than 255 characters");
    }
    if path.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("the repository name must be in lower case");
    }
    let rule = "the repository name may have lower-case letters and digits, and single . _ __ or hyphens between them";
    for component in path.split('/') {
        let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        if !component.bytes().all(|b| word(b) || b"._-".contains(&b)) {
            return Err(rule);
        }
        // What is between the words: nothing may stand at either end, and only these separators inside.
        let mut separators = component.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
        let first = separators.next();
        let last = separators.next_back();
        if component.is_empty() || first != Some("") || last.is_some_and(|s| !s.is_empty()) {
            return Err(rule);
        }
        if !separators.all(|s| matches!(s, "" | "." | "_" | "__") || s.bytes().all(|b| b == b'-')) {
            return Err(rule);
        }
    }
    Ok(())
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let first_ok = tag.bytes().next().is_some_and(word);
    if first_ok && tag.len() <= MAX_TAG && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-') {
        Ok(())
    } else {
        Err("the tag may have up to 128 letters, digits, _ . and hyphens, the last two not in front")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(text: &str, expected: Option<&str>) {
        let parsed: Option<String> = text.parse::<Reference>().ok().map(|r| r.to_string());
        assert_eq!(parsed.as_deref(), expected, "{text}");
    }

    #[test]
    fn references_are_normalised_as_docker_does() {
        let hex = "a".repeat(64);
        let pinned = format!("docker.io/library/debian@sha256:{hex}");
        for (text, expected) in [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:12", "docker.io/library/debian:12"),
            ("team/app", "docker.io/team/app:latest"),
            ("index.docker.io/debian", "docker.io/library/debian:latest"),
            ("docker.io/debian", "docker.io/library/debian:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app:1", "localhost:5000/app:1"),
            ("127.0.0.1:5000/a/b/c:1.2", "127.0.0.1:5000/a/b/c:1.2"),
            ("[::1]:5000/app", "[::1]:5000/app:latest"),
            ("registry.example.com:5000/team/app:1.2", "registry.example.com:5000/team/app:1.2"),
            ("Host/app", "Host/app:latest"),
            ("a__b/c-d---e.f_g", "docker.io/a__b/c-d---e.f_g:latest"),
            (&format!("debian@sha256:{hex}"), &pinned),
            (&format!("debian:12@sha256:{hex}"), &format!("docker.io/library/debian:12@sha256:{hex}")),
        ] {
            check(text, Some(expected));
            check(expected, Some(expected));
        }
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        let long_tag = format!("app:{}", "t".repeat(129));
        let long_path = "p".repeat(256);
        for text in [
            "",
            ":",
            "/",
            "app:",
            "app:-x",
            "app:.x",
            "app:a b",
            &long_tag,
            &long_path,
            "App",
            "host.io/",
            "host.io/App",
            "a//b",
            "/a",
            "a/",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "a._b",
            "_a",
            "host:0/a",
            "host:99999/a",
            "host:x/a",
            "[::1/a",
            "[x]/a",
            "[::1]x/a",
            "-h.io/a",
            "a@sha256:12",
            "a@md5:aa",
            "a@",
            "http://host/a",
            "a:1:2",
            "é",
        ] {
            check(text, None);
        }
    }

    #[test]
    fn hosts_to_connect_to_and_loopback() {
        for (text, host, loopback) in [
            ("debian", "registry-1.docker.io", false),
            ("localhost/app", "localhost", true),
            ("localhost:5000/app", "localhost:5000", true),
            ("127.9.9.9:5000/app", "127.9.9.9:5000", true),
            ("[::1]:5000/app", "[::1]:5000", true),
            ("[::2]/app", "[::2]", false),
            ("10.0.0.1:5000/app", "10.0.0.1:5000", false),
            ("localhost.example.com/app", "localhost.example.com", false),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!((reference.host(), reference.is_loopback()), (host, loopback), "{text}");
        }
    }

    #[test]
    fn the_digest_wins_over_the_tag() {
        let hex = "b".repeat(64);
        for (text, target) in [("a:1", "1"), ("a", "latest"), (&format!("a:1@sha256:{hex}"), &format!("sha256:{hex}"))] {
            assert_eq!(text.parse::<Reference>().unwrap().target(), target, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_parses_or_not_without_panic_and_stays_what_it_is(text in "\\PC{0,60}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
            }
        }

        #[test]
        fn well_formed_text_parses(
            host in "([a-z0-9]{1,5}\\.[a-z]{2,3}(:[1-9][0-9]{0,3})?/)?",
            path in "[a-z0-9]{1,5}([._-][a-z0-9]{1,3})?(/[a-z0-9]{1,4}){0,2}",
            tag in "(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,9})?",
        ) {
            let text = format!("{host}{path}{tag}");
            // A path whose first component has a dot is a host by the rules.
            let reference: Reference = text.parse().unwrap();
            prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
        }
    }
}
