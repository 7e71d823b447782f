//! The gate in front of tests that need root, a kernel feature or a foreign program.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use erofs::image::Checked;
use erofs::meta::Attr;
use erofs::tree::{Body, Inode, Tree};

use crate::scratch::Scratch;

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
    if rustix::process::geteuid().is_root() { Ok(()) } else { Err(Lack("root is needed, for mounts and containers".into())) }
}

/// A program in PATH (or in the sbin directories, where Debian keeps some).
pub fn command(name: &str) -> Need {
    let path = std::env::var("PATH").unwrap_or_default();
    let found = path.split(':').chain(["/usr/sbin", "/sbin"]).any(|dir| Path::new(dir).join(name).is_file());
    if found { Ok(()) } else { Err(Lack(format!("the program {name} is missing (`make deps` installs it)"))) }
}

/// A file system type the running kernel knows; a module that can still be loaded is loaded.
pub fn file_system(name: &str) -> Need {
    let known = || std::fs::read_to_string("/proc/filesystems").is_ok_and(|list| list.split_whitespace().any(|word| word == name));
    if known() {
        return Ok(());
    }
    // Failure shows in the second look; there is nothing else to do about it.
    let _ = std::process::Command::new("modprobe").arg(name).output();
    if known() { Ok(()) } else { Err(Lack(format!("this kernel has no file system {name}"))) }
}

/// A kernel that mounts EROFS from files, which is how Slipway mounts on current kernels. Shown by a trial mount, once per process.
pub fn file_backed_erofs() -> Need {
    static TRIAL: OnceLock<Need> = OnceLock::new();
    root()?;
    file_system("erofs")?;
    TRIAL.get_or_init(|| mount_empty_erofs().map_err(|error| Lack(no_file_backed_erofs(&error)))).clone()
}

fn no_file_backed_erofs(error: &anyhow::Error) -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!(
        "this kernel ({}) does not mount EROFS from files: Linux 6.12 or newer with CONFIG_EROFS_FS_BACKED_BY_FILE does, in Debian 12 \
         linux-image-amd64 of bookworm-backports, booted into ({error:#})",
        kernel.trim()
    )
}

/// Mounts an empty image from a file, looks into it, and unmounts it.
fn mount_empty_erofs() -> Result<()> {
    let root = Inode { attr: Attr { mode: 0o755, ..Attr::default() }, body: Body::Dir(BTreeMap::new()) };
    let tree = Checked::new(Tree { packs: Vec::new(), inodes: vec![root] }).context("an empty root directory is a valid tree")?;
    let scratch = Scratch::new("need")?;
    let (image, at) = (scratch.join("empty.erofs"), scratch.make_dir("at")?);
    std::fs::write(&image, erofs::image::write(&tree).bytes).with_context(|| format!("{} cannot be written", image.display()))?;
    uapi::mount::erofs_file_backed::<&Path>(&image, &[], &at)?;
    ensure!(std::fs::read_dir(&at)?.next().is_none(), "an empty image does not look empty");
    Ok(())
}

/// A file or device node.
pub fn path(path: &str) -> Need {
    if Path::new(path).exists() { Ok(()) } else { Err(Lack(format!("{path} is missing"))) }
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
    fn a_kernel_too_old_is_named_with_what_to_do() {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's release");
        let text = no_file_backed_erofs(&anyhow::anyhow!("block device required"));
        for part in [kernel.trim(), "6.12", "bookworm-backports", "block device required"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }

    #[test]
    fn the_trial_mount_leaves_nothing() {
        crate::require!(file_backed_erofs());
        mount_empty_erofs().expect("what worked works again");
        let left = uapi::mount::mounts()
            .expect("the mount table")
            .into_iter()
            .any(|mount| mount.mount_point.to_string_lossy().contains(&format!("slipway-need-{}-", std::process::id())));
        assert!(!left);
    }

    #[test]
    fn file_systems_come_from_the_running_kernel() {
        assert_eq!(file_system("proc"), Ok(()));
        assert!(file_system("no-such-fs").is_err());
    }
}
