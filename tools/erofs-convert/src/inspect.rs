//! Looking at a store: the images in it, one image, a metadata image as text.

use erofs::digest::Digest;
use erofs::image::{self, Image};
use erofs::meta::PackRef;
use serde_json::{Value, json};
use slipway::oci::{Access, ChainId, Sha256, Source};
use slipway::store::{ImageRoot, Name, Store};

use crate::failure::Failure;
use crate::printable::printable;
use crate::progress::bytes;

/// All images of a store; a damaged root is reported and left out.
pub fn images(store: &Store) -> Result<Vec<ImageRoot>, Failure> {
    let mut images = Vec::new();
    for image in store.images()? {
        match image {
            Ok(image) => images.push(image),
            Err(error) => tracing::warn!(%error, "not an image root"),
        }
    }
    Ok(images)
}

/// The image called `name`: a source as it was given to `convert`, of which the newest version is taken, or the digest of a manifest.
pub fn find(store: &Store, name: &str) -> Result<ImageRoot, Failure> {
    // What is no source may still be a digest.
    let source = Source::parse(name, &Access::default()).map(|source| source.name()).ok();
    let digest: Option<Sha256> = name.parse().ok();
    let matches = |image: &ImageRoot| image.source == name || Some(&image.source) == source.as_ref() || Some(image.manifest) == digest;
    // The newest of each platform, and what there was before; they come newest first.
    let (mut newest, mut older): (Vec<ImageRoot>, Vec<ImageRoot>) = Default::default();
    for image in images(store)?.into_iter().filter(matches) {
        // The same image under several names is one image.
        let same = |other: &ImageRoot| digest.is_some() || (&other.source, &other.platform) == (&image.source, &image.platform);
        if newest.iter().any(same) { older.push(image) } else { newest.push(image) }
    }
    match newest.len() {
        0 => Err(Failure::NotConverted { name: name.to_owned(), store: store.dir().to_owned() }),
        1 => {
            let newest = newest.remove(0);
            let others: Vec<String> = older.iter().filter(|other| other.manifest != newest.manifest).map(|other| other.manifest.oci()).collect();
            if !others.is_empty() {
                let taken = newest.manifest.oci();
                tracing::warn!(image = name, taken, others = others.join(", "), "several versions are in the store: this is the newest");
            }
            Ok(newest)
        }
        _ => {
            let choices = newest.iter().map(|image| format!("{} {}", image.platform, image.manifest.oci())).collect();
            Err(Failure::Ambiguous { name: name.to_owned(), choices })
        }
    }
}

/// The list, for people.
pub fn list_text(images: &[ImageRoot]) -> String {
    let mut rows = vec![["IMAGE", "PLATFORM", "LAYERS", "CONTENT", "STORED", "MANIFEST"].map(str::to_owned)];
    rows.extend(images.iter().map(|image| {
        let sizes = &image.sizes;
        let manifest = image.manifest.to_string()[..12].to_owned();
        [printable(&image.source), printable(&image.platform), image.layers.len().to_string(), bytes(sizes.content), bytes(sizes.stored), manifest]
    }));
    table(&rows)
}

/// The list, for programs.
pub fn list_json(images: &[ImageRoot]) -> Value {
    json!({"images": images.iter().map(root_json).collect::<Vec<_>>()})
}

fn root_json(image: &ImageRoot) -> Value {
    let layers = image
        .layers
        .iter()
        .map(|layer| json!({"digest": layer.blob.oci(), "size": layer.size, "diffId": layer.diff_id.oci(), "tree": layer.tree.to_string()}));
    json!({
        "source": image.source,
        "target": image.target,
        "platform": image.platform,
        "manifest": image.manifest.oci(),
        "chain": image.chain.oci(),
        "metadata": image.metadata.to_string(),
        "layers": layers.collect::<Vec<_>>(),
        "sizes": image.sizes,
        "compact": image.compact.iter().map(ChainId::oci).collect::<Vec<_>>(),
    })
}

/// One image with what only its files tell.
pub struct Shown {
    /// Its root.
    pub root: ImageRoot,
    /// Its packs in device order, with the lengths of their files; `None` for one that is missing.
    pub packs: Vec<(PackRef, Option<u64>)>,
}

/// Reads what there is about the image called `name`.
pub fn show(store: &Store, name: &str) -> Result<Shown, Failure> {
    let root = find(store, name)?;
    let metadata = store.read_metadata(&root.metadata)?;
    let image = Image::open(&metadata).and_then(|image| image.to_tree());
    let tree = image.map_err(|source| Failure::Metadata { digest: root.metadata, source })?;
    let packs = tree.packs.iter().map(|pack| Ok((*pack, store.file_len(&Name::Pack(pack.digest))?))).collect::<Result<_, Failure>>()?;
    Ok(Shown { root, packs })
}

/// One image, for people.
pub fn show_text(shown: &Shown) -> String {
    let root = &shown.root;
    let mut text = format!(
        "image     {}\n{}platform  {}\nmanifest  {}\nchain     {}\n{}metadata  {} ({})\ncontent   {} in {} inodes\nstored    {}\n\n",
        printable(&root.source),
        root.target.iter().map(|target| format!("target    {}\n", printable(target))).collect::<String>(),
        printable(&root.platform),
        root.manifest.oci(),
        root.chain.oci(),
        root.compact.iter().map(|chain| format!("compact   {}\n", chain.oci())).collect::<String>(),
        root.metadata,
        bytes(root.sizes.metadata),
        bytes(root.sizes.content),
        root.sizes.inodes,
        bytes(root.sizes.stored),
    );
    let mut rows = vec![["LAYER", "SIZE", "DIFF ID", "TREE"].map(str::to_owned)];
    rows.extend(
        root.layers.iter().map(|l| [l.blob.to_string(), bytes(l.size), l.diff_id.to_string()[..12].to_owned(), l.tree.to_string()[..12].to_owned()]),
    );
    text.push_str(&table(&rows));
    text.push('\n');
    let mut rows = vec![["PACK", "CONTENT", "FILE", "UNIT"].map(str::to_owned)];
    rows.extend(shown.packs.iter().map(|(pack, len)| {
        let content = u64::from(pack.blocks) * erofs::block::BLOCK_SIZE;
        let file = len.map_or("missing".to_owned(), bytes);
        [pack.digest.to_string(), bytes(content), file, bytes(pack.unit_bits.bytes())]
    }));
    text.push_str(&table(&rows));
    text
}

/// One image, for programs.
pub fn show_json(shown: &Shown) -> Value {
    let mut value = root_json(&shown.root);
    let packs = shown
        .packs
        .iter()
        .map(|(pack, len)| json!({"digest": pack.digest.to_string(), "blocks": pack.blocks, "unitSize": pack.unit_bits.bytes(), "size": len}));
    value["packs"] = packs.collect();
    value
}

/// A metadata image as text, by image or by its own digest.
pub fn dump(store: &Store, name: &str) -> Result<String, Failure> {
    let digest = match find(store, name) {
        Ok(root) => root.metadata,
        Err(error @ Failure::NotConverted { .. }) => match name.parse::<Digest>() {
            Ok(digest) if store.file_len(&Name::Meta(digest))?.is_some() => digest,
            _ => return Err(error),
        },
        Err(error) => return Err(error),
    };
    let bytes = store.read_metadata(&digest)?;
    let image = Image::open(&bytes).map_err(|source| Failure::Metadata { digest, source })?;
    let mut text = String::new();
    image::dump(&image, &mut text).expect("writing to a String cannot fail");
    Ok(text)
}

/// Rows as columns of equal width, the last one ragged.
fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let mut text = String::new();
    for row in rows {
        for (column, cell) in row.iter().enumerate() {
            if column + 1 == N {
                text.push_str(cell);
            } else {
                let width = rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
                text.push_str(&format!("{cell:width$}  "));
            }
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_a_list_cannot_break_out_of_it() {
        let none = Sha256::of(b"");
        let image = ImageRoot {
            source: "a\u{1b}[2J\nb".to_owned(),
            target: None,
            platform: "linux/\u{7}".to_owned(),
            manifest: none,
            chain: slipway::oci::ChainId(none),
            metadata: Digest::of(b""),
            config: slipway::store::RootConfig::new(b"{}"),
            layers: Vec::new(),
            sizes: Default::default(),
            compact: Vec::new(),
        };
        for (text, lines) in [(list_text(std::slice::from_ref(&image)), 2), (show_text(&Shown { root: image, packs: Vec::new() }), 11)] {
            assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
            assert!(text.lines().count() == lines && text.contains("a\\u{1b}[2J\\nb"), "{text}");
        }
    }

    #[test]
    fn columns_line_up() {
        let rows = [["A", "B"], ["long", "x"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(&rows), "A     B\nlong  x\n");
    }
}
