//! The gate in front of tests that need root, a kernel feature or a foreign program.

use std::path::Path;

/// Something a test needs and this machine lacks; the text says what and how to get it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lack(pub String);

/// Whether the machine has one thing.
pub type Need = Result<(), Lack>;

/// Skips the test that calls it, saying why, unless every need is met. Where `CI` or `SLIPWAY_NO_SKIP` is set a lack is a failure:
/// there the machine is known to have everything, so a skip would hide a test that no longer runs.
///
/// ```text
/// require!(need::root(), need::command("containerd"));
/// ```
#[macro_export]
macro_rules! require {
    ($($need:expr),+ $(,)?) => {
        $(if let Err(lack) = $need {
            $crate::need::skip(&lack);
            return;
        })+
    };
}

/// Prints the reason of a skip, or panics where a skip is a failure (see [`require!`]).
pub fn skip(lack: &Lack) {
    let strict =
        ["CI", "SLIPWAY_NO_SKIP"].into_iter().find(|name| std::env::var(name).is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "false")));
    match strict {
        Some(name) => panic!("{}, and {name} is set, so a skip is a failure", lack.0),
        None => eprintln!("SKIPPED: {}", lack.0),
    }
}

/// Root: mounts, loop devices, containers.
pub fn root() -> Need {
    if rustix::process::geteuid().is_root() { Ok(()) } else { Err(Lack("this test needs root".into())) }
}

/// A program in PATH (or in the sbin directories, where Debian keeps some).
pub fn command(name: &str) -> Need {
    let path = std::env::var("PATH").unwrap_or_default();
    let found = path.split(':').chain(["/usr/sbin", "/sbin"]).any(|dir| Path::new(dir).join(name).is_file());
    if found { Ok(()) } else { Err(Lack(format!("this test needs the program {name} (`make deps` installs it)"))) }
}

/// A file system type the running kernel knows; a module that can still be loaded is loaded.
pub fn file_system(name: &str) -> Need {
    let known = || std::fs::read_to_string("/proc/filesystems").is_ok_and(|list| list.split_whitespace().any(|word| word == name));
    if known() {
        return Ok(());
    }
    // Failure shows in the second look; there is nothing else to do about it.
    let _ = std::process::Command::new("modprobe").arg(name).output();
    if known() { Ok(()) } else { Err(Lack(format!("this test needs the kernel's {name} file system"))) }
}

/// A file or device node.
pub fn path(path: &str) -> Need {
    if Path::new(path).exists() { Ok(()) } else { Err(Lack(format!("this test needs {path}"))) }
}

/// What every test that starts containers needs.
pub fn containers() -> Need {
    root()?;
    for name in ["containerd", "ctr", "runc", "docker-registry", "skopeo"] {
        command(name)?;
    }
    file_system("overlay")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_names_the_missing_program() {
        assert_eq!(command("sh"), Ok(()));
        let lack = command("no-such-program-at-all").expect_err("there is no such program");
        assert!(lack.0.contains("no-such-program-at-all"));
    }

    #[test]
    fn file_systems_come_from_the_running_kernel() {
        assert_eq!(file_system("proc"), Ok(()));
        assert!(file_system("no-such-fs").is_err());
    }
}
