//! The demo's image: layers made by `tools/demo/image/build.sh`, put together and pushed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use testbed::{BuiltImage, Compression, Image, Layout};

/// The program the container runs. The first line marks the moment the container's own process runs.
pub const WORKLOAD: [&str; 3] = ["/bin/sh", "-c", "echo started; exec python3 /opt/app/workload.py"];

/// One layer as the script left it.
#[derive(Debug)]
pub struct DemoLayer {
    /// The gzip file.
    pub file: PathBuf,
    diff_id: String,
    compressed: u64,
    uncompressed: u64,
}

/// All layers, from the bottom.
#[derive(Debug)]
pub struct DemoImage {
    /// From the bottom.
    pub layers: Vec<DemoLayer>,
}

impl DemoImage {
    /// Finds the layers in the script's output directory: `NN-name.tar.gz` with `.diffid` and `.size` beside it.
    pub fn open(dir: &Path) -> Result<DemoImage> {
        let mut files: Vec<PathBuf> = fs::read_dir(dir)
            .with_context(|| format!("{} cannot be listed", dir.display()))?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<_>>()?;
        files.retain(|file| file.to_string_lossy().ends_with(".tar.gz"));
        files.sort();
        ensure!(!files.is_empty(), "{} holds no layers: run tools/demo/image/build.sh", dir.display());
        let layers = files.into_iter().map(layer).collect::<Result<_>>()?;
        Ok(DemoImage { layers })
    }

    /// Bytes of all layers as the registry holds them.
    pub fn compressed(&self) -> u64 {
        self.layers.iter().map(|layer| layer.compressed).sum()
    }

    /// Bytes of all layers' uncompressed archives.
    pub fn uncompressed(&self) -> u64 {
        self.layers.iter().map(|layer| layer.uncompressed).sum()
    }

    /// Makes an OCI layout of the layers in `dir`, tagged `demo`.
    pub fn lay_out(&self, dir: &Path) -> Result<(Layout, BuiltImage)> {
        let layout = Layout::create(dir)?;
        let image = self.layers.iter().fold(Image::new(), |image, layer| image.layer_file(&layer.file, Compression::Gzip, &layer.diff_id));
        let built = layout.add("demo", &image)?;
        Ok((layout, built))
    }

    /// Makes the layout in `dir` and pushes it.
    pub fn push(&self, dir: &Path, reference: &str) -> Result<BuiltImage> {
        let (layout, built) = self.lay_out(dir)?;
        layout.push("demo", reference)?;
        Ok(built)
    }
}

fn layer(file: PathBuf) -> Result<DemoLayer> {
    let beside = |suffix: &str| {
        let path = PathBuf::from(file.to_string_lossy().replace(".tar.gz", suffix));
        fs::read_to_string(&path).map(|text| text.trim().to_owned()).with_context(|| format!("{} cannot be read", path.display()))
    };
    let (diff_id, uncompressed) = (format!("sha256:{}", beside(".diffid")?), beside(".size")?);
    let uncompressed = uncompressed.parse().with_context(|| format!("the size of {} is not a number", file.display()))?;
    let compressed = fs::metadata(&file).with_context(|| format!("{} cannot be looked at", file.display()))?.len();
    Ok(DemoLayer { diff_id, compressed, uncompressed, file })
}
