//! Which mounts give a snapshot's content: pure, from numbers and paths.
//!
//! Plain snapshots get what containerd's overlayfs snapshotter gives (`plugins/snapshots/overlay/overlay.go`, `mounts`). Where an image
//! lies below, there is always an overlay on top of its mount, because that mount is `nodev,nosuid` and a bind of it would be too.

use std::path::{Path, PathBuf};

use super::ledger::{Kind, SnapshotId};
use super::proto::Mount;

/// Where content is, and what overlayfs on this machine wants to be told.
#[derive(Clone, Debug)]
pub struct Layout {
    snapshots: PathBuf,
    empty: PathBuf,
    options: Vec<String>,
}

impl Layout {
    /// For the given state directory. `options` go to every overlay.
    ///
    /// The names below it are short because an image may have 128 layers and the whole option string must fit in one page (4096 bytes).
    pub fn new(state: &Path, options: Vec<String>) -> Layout {
        Layout { snapshots: state.join("s"), empty: state.join("empty"), options }
    }

    /// The directory that holds one directory per snapshot.
    pub fn snapshots(&self) -> &Path {
        &self.snapshots
    }

    /// An empty directory, for overlays that need one lower more.
    pub fn empty(&self) -> &Path {
        &self.empty
    }

    /// The directory of one snapshot.
    pub fn of(&self, id: SnapshotId) -> PathBuf {
        self.snapshots.join(id.0.to_string())
    }

    /// Where the content of a plain snapshot is: what it adds to or changes in what lies below.
    pub fn upper(&self, id: SnapshotId) -> PathBuf {
        self.of(id).join("fs")
    }

    /// Where overlayfs prepares changes to [`Layout::upper`].
    pub fn work(&self, id: SnapshotId) -> PathBuf {
        self.of(id).join("work")
    }

    /// The mounts of snapshot `id`. Below it are the plain snapshots `uppers`, nearest first, then the mounted image `lower`.
    pub fn mounts(&self, kind: Kind, id: SnapshotId, uppers: &[SnapshotId], lower: Option<&Path>) -> Vec<Mount> {
        match (kind, uppers, lower) {
            (Kind::View, [], None) => bind(&self.upper(id), "ro"),
            (_, [], None) => bind(&self.upper(id), "rw"),
            (Kind::View, [only], None) => bind(&self.upper(*only), "ro"),
            (Kind::View, [], Some(image)) => self.overlay(None, vec![image.to_owned(), self.empty.clone()]),
            (Kind::View, ..) => self.overlay(None, self.lowers(uppers, lower)),
            _ => self.overlay(Some(id), self.lowers(uppers, lower)),
        }
    }

    fn lowers(&self, uppers: &[SnapshotId], lower: Option<&Path>) -> Vec<PathBuf> {
        uppers.iter().map(|id| self.upper(*id)).chain(lower.map(Path::to_owned)).collect()
    }

    fn overlay(&self, writable: Option<SnapshotId>, lowers: Vec<PathBuf>) -> Vec<Mount> {
        let mut options = Vec::new();
        if let Some(id) = writable {
            options.push(format!("workdir={}", text(&self.work(id))));
            options.push(format!("upperdir={}", text(&self.upper(id))));
        }
        let lowers: Vec<_> = lowers.iter().map(|path| text(path)).collect();
        options.push(format!("lowerdir={}", lowers.join(":")));
        options.extend(self.options.iter().cloned());
        vec![Mount { r#type: "overlay".into(), source: "overlay".into(), target: String::new(), options }]
    }
}

fn bind(source: &Path, access: &str) -> Vec<Mount> {
    let options = vec![access.to_owned(), "rbind".to_owned()];
    vec![Mount { r#type: "bind".into(), source: text(source), target: String::new(), options }]
}

fn text(path: &Path) -> String {
    path.to_str().expect("a state directory that is not UTF-8 is refused at start").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes mounts as `type source options`.
    fn check(kind: Kind, uppers: &[u64], lower: Option<&str>, expected: &str) {
        let layout = Layout::new(Path::new("/st"), vec!["index=off".into()]);
        let uppers: Vec<_> = uppers.iter().copied().map(SnapshotId).collect();
        let mounts = layout.mounts(kind, SnapshotId(9), &uppers, lower.map(Path::new));
        let written: Vec<_> = mounts.iter().map(|mount| format!("{} {} {}", mount.r#type, mount.source, mount.options.join(","))).collect();
        assert_eq!(written, [expected], "{kind:?} on {uppers:?} and {lower:?}");
    }

    #[test]
    fn plain_snapshots_get_the_mounts_of_containerds_overlayfs() {
        check(Kind::Active, &[], None, "bind /st/s/9/fs rw,rbind");
        check(Kind::View, &[], None, "bind /st/s/9/fs ro,rbind");
        check(Kind::View, &[3], None, "bind /st/s/3/fs ro,rbind");
        check(Kind::View, &[3, 2], None, "overlay overlay lowerdir=/st/s/3/fs:/st/s/2/fs,index=off");
        check(Kind::Active, &[3], None, "overlay overlay workdir=/st/s/9/work,upperdir=/st/s/9/fs,lowerdir=/st/s/3/fs,index=off");
        check(Kind::Active, &[3, 2], None, "overlay overlay workdir=/st/s/9/work,upperdir=/st/s/9/fs,lowerdir=/st/s/3/fs:/st/s/2/fs,index=off");
    }

    #[test]
    fn an_image_below_is_the_last_lower_of_an_overlay() {
        check(Kind::Active, &[], Some("/m/x"), "overlay overlay workdir=/st/s/9/work,upperdir=/st/s/9/fs,lowerdir=/m/x,index=off");
        check(
            Kind::Active,
            &[4, 3],
            Some("/m/x"),
            "overlay overlay workdir=/st/s/9/work,upperdir=/st/s/9/fs,lowerdir=/st/s/4/fs:/st/s/3/fs:/m/x,index=off",
        );
        check(Kind::View, &[3], Some("/m/x"), "overlay overlay lowerdir=/st/s/3/fs:/m/x,index=off");
    }

    #[test]
    fn a_view_of_one_image_is_never_a_bind_mount() {
        check(Kind::View, &[], Some("/m/x"), "overlay overlay lowerdir=/m/x:/st/empty,index=off");
    }

    #[test]
    fn options_of_128_layers_fit_in_a_page() {
        let layout = Layout::new(Path::new("/var/lib/slipway"), vec!["index=off".into(), "userxattr".into()]);
        let uppers: Vec<_> = (10_000..10_127).map(SnapshotId).collect();
        let digest = "0".repeat(64);
        let image = format!("/var/lib/slipway/mounts/{digest}.1");
        let mounts = layout.mounts(Kind::Active, SnapshotId(10_200), &uppers, Some(Path::new(&image)));
        let length = mounts[0].options.join(",").len();
        assert!(length < 4096, "{length} bytes");
    }
}
