//! OCI images in an OCI layout directory, and pushing them to a registry.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::daemon::run;
use crate::layer::{Compression, Layer, sha256};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// An image to be built: layers from the bottom, and its platform.
#[derive(Debug, Clone)]
pub struct Image {
    layers: Vec<Source>,
    architecture: String,
}

/// Where a layer's blob comes from.
#[derive(Debug, Clone)]
enum Source {
    Entries(Layer, Compression),
    File { path: PathBuf, media_type: &'static str, diff_id: String },
}

impl Default for Image {
    fn default() -> Image {
        Image::new()
    }
}

impl Image {
    /// An image without layers for this machine's platform.
    pub fn new() -> Image {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Image { layers: Vec::new(), architecture: architecture.to_owned() }
    }

    /// With one more layer on top.
    pub fn layer(mut self, layer: &Layer, compression: Compression) -> Image {
        self.layers.push(Source::Entries(layer.clone(), compression));
        self
    }

    /// With one more layer on top whose blob lies in a file; `diff_id` is `sha256:…` of its uncompressed archive.
    pub fn layer_file(mut self, path: &Path, compression: Compression, diff_id: &str) -> Image {
        self.layers.push(Source::File { path: path.to_path_buf(), media_type: compression.media_type(), diff_id: diff_id.to_owned() });
        self
    }

    /// For another processor (`arm64`).
    pub fn architecture(self, architecture: &str) -> Image {
        Image { architecture: architecture.to_owned(), ..self }
    }
}

/// One blob of a built image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Its OCI media type.
    pub media_type: String,
    /// `sha256:…`
    pub digest: String,
    /// Its length in bytes.
    pub size: u64,
}

impl Descriptor {
    fn json(&self) -> Value {
        json!({ "mediaType": self.media_type, "digest": self.digest, "size": self.size })
    }
}

/// What an image became: the names under which registry and containerd know its parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltImage {
    /// The manifest.
    pub manifest: Descriptor,
    /// The configuration.
    pub config: Descriptor,
    /// Layers from the bottom.
    pub layers: Vec<Descriptor>,
    /// Digests of the uncompressed layers from the bottom.
    pub diff_ids: Vec<String>,
    /// Chain IDs: entry i stands for layers 0..=i.
    pub chains: Vec<String>,
}

impl BuiltImage {
    /// The chain ID of all layers. Panics for an image without layers.
    pub fn top_chain(&self) -> &str {
        self.chains.last().expect("an image with a top chain has a layer")
    }
}

/// An OCI layout directory.
#[derive(Debug, Clone)]
pub struct Layout {
    dir: PathBuf,
}

impl Layout {
    /// Makes `dir` (and its parents) an empty layout, or opens the one that is there.
    pub fn create(dir: &Path) -> Result<Layout> {
        fs::create_dir_all(dir.join("blobs/sha256")).with_context(|| format!("{} cannot be made", dir.display()))?;
        fs::write(dir.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}\n")?;
        let layout = Layout { dir: dir.to_path_buf() };
        if !dir.join("index.json").exists() {
            layout.write_index(Vec::new())?;
        }
        Ok(layout)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The file of a blob (`sha256:…`).
    pub fn blob(&self, digest: &str) -> PathBuf {
        self.dir.join("blobs").join(digest.replace(':', "/"))
    }

    /// Adds an image under a tag (which moves if it is there already).
    pub fn add(&self, tag: &str, image: &Image) -> Result<BuiltImage> {
        let built = self.build(image)?;
        self.tag(tag, built.manifest.json())?;
        Ok(built)
    }

    /// Adds an index of several images (one per platform, in this order) under a tag.
    pub fn add_index(&self, tag: &str, images: &[Image]) -> Result<Vec<BuiltImage>> {
        let built: Vec<BuiltImage> = images.iter().map(|image| self.build(image)).collect::<Result<_>>()?;
        let entries: Vec<Value> = images
            .iter()
            .zip(&built)
            .map(|(image, built)| {
                let mut entry = built.manifest.json();
                entry["platform"] = json!({ "architecture": image.architecture, "os": "linux" });
                entry
            })
            .collect();
        let index = self.put(INDEX, &serde_json::to_vec(&json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": entries }))?)?;
        self.tag(tag, index.json())?;
        Ok(built)
    }

    /// Pushes what `tag` names, unchanged, to a registry reference (plain HTTP, or TLS of any certificate), as the user of
    /// [`crate::Registry`]s that want one.
    pub fn push(&self, tag: &str, reference: &str) -> Result<()> {
        let from = format!("oci:{}:{tag}", self.dir.display());
        let to = format!("docker://{reference}");
        // skopeo is called without the host's policy file: what is pushed was made here.
        let login = format!("--dest-creds={}:{}", crate::USER, crate::PASSWORD);
        let options = ["--quiet", "--all", "--preserve-digests", "--dest-tls-verify=false", &login];
        run("skopeo", [&["--insecure-policy", "copy"][..], &options, &[&from, &to]].concat()).map(drop)
    }

    fn build(&self, image: &Image) -> Result<BuiltImage> {
        let mut layers = Vec::new();
        let mut diff_ids = Vec::new();
        for source in &image.layers {
            match source {
                Source::Entries(layer, compression) => {
                    let blob = layer.blob(*compression)?;
                    layers.push(self.put(blob.media_type, &blob.bytes)?);
                    diff_ids.push(blob.diff_id);
                }
                Source::File { path, media_type, diff_id } => {
                    layers.push(self.put_file(media_type, path)?);
                    diff_ids.push(diff_id.clone());
                }
            }
        }
        let config = json!({
            "architecture": image.architecture, "os": "linux", "created": "2020-01-01T00:00:00Z",
            "config": { "Env": ["PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["/bin/sh"] },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = self.put(CONFIG, &serde_json::to_vec(&config)?)?;
        let layer_descriptors: Vec<Value> = layers.iter().map(Descriptor::json).collect();
        let manifest = json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config.json(), "layers": layer_descriptors });
        let manifest = self.put(MANIFEST, &serde_json::to_vec(&manifest)?)?;
        Ok(BuiltImage { manifest, config, layers, chains: chain_ids(&diff_ids), diff_ids })
    }

    fn put(&self, media_type: &str, bytes: &[u8]) -> Result<Descriptor> {
        let digest = sha256(bytes);
        let path = self.blob(&digest);
        fs::write(&path, bytes).with_context(|| format!("{} cannot be written", path.display()))?;
        Ok(Descriptor { media_type: media_type.to_owned(), digest, size: bytes.len() as u64 })
    }

    /// As [`Layout::put`] for a file that may be too large for memory; hard links it in where that is possible.
    fn put_file(&self, media_type: &str, from: &Path) -> Result<Descriptor> {
        let (digest, size) = sha256_of_file(from).with_context(|| format!("{} cannot be read", from.display()))?;
        let path = self.blob(&digest);
        if !path.exists() && fs::hard_link(from, &path).is_err() {
            fs::copy(from, &path).with_context(|| format!("{} cannot be written", path.display()))?;
        }
        Ok(Descriptor { media_type: media_type.to_owned(), digest, size })
    }

    fn tag(&self, tag: &str, mut descriptor: Value) -> Result<()> {
        descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
        let text = fs::read(self.dir.join("index.json"))?;
        let index: Value = serde_json::from_slice(&text).context("index.json is not JSON")?;
        let mut manifests = index["manifests"].as_array().cloned().unwrap_or_default();
        manifests.retain(|entry| entry["annotations"]["org.opencontainers.image.ref.name"] != tag);
        manifests.push(descriptor);
        self.write_index(manifests)
    }

    fn write_index(&self, manifests: Vec<Value>) -> Result<()> {
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests });
        fs::write(self.dir.join("index.json"), serde_json::to_vec(&index)?).with_context(|| format!("{} cannot be written", self.dir.display()))
    }
}

/// The OCI chain IDs of a list of diff IDs (image-spec, config.md): the first is the diff ID itself, each next one the digest of
/// "chain so far, space, diff ID".
fn chain_ids(diff_ids: &[String]) -> Vec<String> {
    let mut chains: Vec<String> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        chains.push(match chains.last() {
            None => diff_id.clone(),
            Some(below) => sha256(format!("{below} {diff_id}").as_bytes()),
        });
    }
    chains
}

fn sha256_of_file(path: &Path) -> std::io::Result<(String, u64)> {
    let mut file = File::open(path)?;
    let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    let mut buffer = vec![0; 1 << 20];
    let mut size = 0;
    loop {
        let length = file.read(&mut buffer)?;
        if length == 0 {
            let digest = context.finish();
            return Ok((digest.as_ref().iter().fold("sha256:".to_owned(), |text, byte| text + &format!("{byte:02x}")), size));
        }
        context.update(&buffer[..length]);
        size += length as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Entry, Scratch};

    #[test]
    fn chain_ids_follow_the_image_specification() {
        let diff_ids = [sha256(b"one"), sha256(b"two"), sha256(b"three")];
        let chains = chain_ids(&diff_ids);
        assert_eq!(chains[0], diff_ids[0]);
        assert_eq!(chains[1], sha256(format!("{} {}", diff_ids[0], diff_ids[1]).as_bytes()));
        assert_eq!(chains[2], sha256(format!("{} {}", chains[1], diff_ids[2]).as_bytes()));
    }

    #[test]
    fn a_layer_from_a_file_is_the_same_as_one_from_entries() {
        let scratch = Scratch::new("layout").expect("a scratch directory");
        let layer = Layer::new([Entry::file("a", b"x".to_vec())]);
        let blob = layer.blob(Compression::Gzip).expect("a blob");
        let file = scratch.join("layer.tar.gz");
        fs::write(&file, &blob.bytes).expect("a file");
        let layout = Layout::create(&scratch.join("layout")).expect("a layout");
        let one = layout.add("one", &Image::new().layer(&layer, Compression::Gzip)).expect("an image");
        let two = layout.add("two", &Image::new().layer_file(&file, Compression::Gzip, &blob.diff_id)).expect("an image");
        assert_eq!(one, two);
        assert_eq!(fs::read(layout.blob(&one.layers[0].digest)).expect("the blob"), blob.bytes);
    }

    #[test]
    fn tags_move_and_stay_apart() {
        let scratch = Scratch::new("layout").expect("a scratch directory");
        let layout = Layout::create(&scratch.join("layout")).expect("a layout");
        let image = |name: &str| Image::new().layer(&Layer::new([Entry::file(name, Vec::new())]), Compression::Plain);
        layout.add("a", &image("first")).expect("an image");
        layout.add("b", &image("second")).expect("an image");
        let moved = layout.add("a", &image("third")).expect("an image");
        layout.add_index("i", &[image("x").architecture("arm64"), image("y")]).expect("an index");
        let index: Value = serde_json::from_slice(&fs::read(layout.path().join("index.json")).expect("the index")).expect("JSON");
        let manifests = index["manifests"].as_array().expect("a list");
        assert_eq!(manifests.len(), 3);
        assert!(
            manifests
                .iter()
                .any(|entry| entry["digest"] == moved.manifest.digest && entry["annotations"]["org.opencontainers.image.ref.name"] == "a")
        );
    }
}
