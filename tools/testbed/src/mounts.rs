//! Mount points as the kernel lists them, and getting rid of those below a directory.

use std::path::Path;

use uapi::mount::{MountEntry, Unmount, unmount};

/// All mount points this process sees, in the order they were made; none where the kernel does not say.
pub(crate) fn list() -> Vec<MountEntry> {
    uapi::mount::mounts().unwrap_or_default()
}

/// Whether something is mounted exactly at `path`.
pub fn is_mounted(path: &Path) -> bool {
    list().iter().any(|mount| mount.mount_point == path)
}

/// Whether something is mounted at or below `dir`.
pub fn is_anything_mounted_below(dir: &Path) -> bool {
    list().iter().any(|mount| mount.mount_point.starts_with(dir))
}

/// Unmounts everything mounted at or below `dir`, the newest first. A busy mount, or one whose FUSE server is gone, is detached: it
/// disappears from sight at once and is freed with its last user.
pub fn unmount_below(dir: &Path) {
    for mount in list().into_iter().rev().filter(|mount| mount.mount_point.starts_with(dir)) {
        if unmount(&mount.mount_point, Unmount::IfUnused).is_err() {
            // Nothing is left to try after this; what stays mounted shows when its directory cannot be removed.
            let _ = unmount(&mount.mount_point, Unmount::Detach);
        }
    }
}
