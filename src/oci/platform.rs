//! Platforms: what an image was built for, in Go's words (`GOOS/GOARCH/variant`).

use std::fmt;
use std::str::FromStr;

/// Operating system, architecture and, for ARM, its variant; normalised as containerd does it (`platforms/database.go`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Platform {
    /// `linux` for everything Slipway can run.
    pub os: String,
    /// `amd64`, `arm64`, …
    pub architecture: String,
    /// `v6` … `v8` for 32-bit ARM, micro-architecture levels elsewhere; absent means the base level.
    pub variant: Option<String>,
}

/// The text is no platform.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a platform: expected something like linux/amd64 or linux/arm/v7")]
pub struct BadPlatform(pub String);

impl Platform {
    /// From the parts that image documents carry, which come in many spellings.
    pub fn new(os: &str, architecture: &str, variant: Option<&str>) -> Platform {
        let variant = variant.filter(|v| !v.is_empty()).map(str::to_lowercase);
        let (architecture, variant) = match (architecture.to_lowercase().as_str(), variant.as_deref()) {
            ("x86_64" | "x86-64" | "amd64", None | Some("v1")) => ("amd64", None),
            ("x86_64" | "x86-64" | "amd64", level) => ("amd64", level.map(str::to_owned)),
            ("i386" | "i686" | "386", _) => ("386", None),
            ("aarch64" | "arm64", None | Some("8" | "v8" | "v8.0")) => ("arm64", None),
            ("aarch64" | "arm64", level) => ("arm64", level.map(str::to_owned)),
            ("armhf", _) | ("arm", None | Some("7")) => ("arm", Some("v7".to_owned())),
            ("armel", _) => ("arm", Some("v6".to_owned())),
            ("arm", Some(digit @ ("5" | "6" | "8"))) => ("arm", Some(format!("v{digit}"))),
            (other, level) => return Platform { os: os.to_lowercase(), architecture: other.to_owned(), variant: level.map(str::to_owned) },
        };
        Platform { os: os.to_lowercase(), architecture: architecture.to_owned(), variant }
    }

    /// What this program runs on.
    pub fn host() -> Platform {
        // Rust's names of the architectures Linux has containers for, where Go's differ.
        let architecture = match std::env::consts::ARCH {
            "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
            "loongarch64" => "loong64",
            other => other,
        };
        Platform::new("linux", architecture, None)
    }

    /// How well an image for `offered` runs here: 0 is exact, larger is worse, `None` is not at all.
    /// 32-bit ARM runs the variants below its own, as in containerd (`platforms/compare.go`); nothing else is tried.
    pub fn distance(&self, offered: &Platform) -> Option<u32> {
        if self == offered {
            return Some(0);
        }
        if self.os != offered.os || self.architecture != "arm" || offered.architecture != "arm" {
            return None;
        }
        let level = |p: &Platform| p.variant.as_deref()?.strip_prefix('v')?.parse::<u32>().ok();
        level(self)?.checked_sub(level(offered)?)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.iter().try_for_each(|variant| write!(f, "/{variant}"))
    }
}

impl FromStr for Platform {
    type Err = BadPlatform;

    fn from_str(text: &str) -> Result<Self, BadPlatform> {
        let parts: Vec<&str> = text.split('/').collect();
        let plain = |part: &&str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
        if !parts.iter().all(plain) {
            return Err(BadPlatform(text.to_owned()));
        }
        match parts[..] {
            [os, architecture] => Ok(Platform::new(os, architecture, None)),
            [os, architecture, variant] => Ok(Platform::new(os, architecture, Some(variant))),
            _ => Err(BadPlatform(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_are_normalised() {
        for (text, expected) in [
            ("linux/amd64", Some("linux/amd64")),
            ("Linux/x86_64", Some("linux/amd64")),
            ("linux/amd64/v1", Some("linux/amd64")),
            ("linux/amd64/v3", Some("linux/amd64/v3")),
            ("linux/aarch64", Some("linux/arm64")),
            ("linux/arm64/v8", Some("linux/arm64")),
            ("linux/arm", Some("linux/arm/v7")),
            ("linux/armhf", Some("linux/arm/v7")),
            ("linux/arm/6", Some("linux/arm/v6")),
            ("linux/i386", Some("linux/386")),
            ("linux/riscv64", Some("linux/riscv64")),
            ("amd64", None),
            ("linux/", None),
            ("/amd64", None),
            ("", None),
            ("linux/amd64/v2/x", None),
            ("linux/am d64", None),
        ] {
            let parsed = text.parse::<Platform>().ok().map(|p| p.to_string());
            assert_eq!(parsed.as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn only_arm_accepts_other_variants_and_only_lower_ones() {
        for (wanted, offered, expected) in [
            ("linux/amd64", "linux/amd64", Some(0)),
            ("linux/amd64", "linux/arm64", None),
            ("linux/amd64", "linux/amd64/v3", None),
            ("linux/amd64", "windows/amd64", None),
            ("linux/arm/v7", "linux/arm/v6", Some(1)),
            ("linux/arm/v6", "linux/arm/v7", None),
            ("linux/arm64", "linux/arm/v7", None),
        ] {
            let [wanted, offered]: [Platform; 2] = [wanted.parse().unwrap(), offered.parse().unwrap()];
            assert_eq!(wanted.distance(&offered), expected, "{wanted} {offered}");
        }
    }

    #[test]
    fn the_host_is_linux() {
        assert_eq!(Platform::host().os, "linux");
    }
}
