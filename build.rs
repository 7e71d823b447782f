//! Generates the gRPC code of containerd's snapshots service from the vendored protos, without needing `protoc`.

use std::error::Error;
use std::path::Path;

/// Holds containerd's files under the paths their own `import` lines use.
const PROTO_ROOT: &str = "src/snapshot/proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={PROTO_ROOT}");
    let snapshots = Path::new(PROTO_ROOT).join("services/snapshots/v1/snapshots.proto");
    let descriptors = protox::compile([snapshots], [PROTO_ROOT])?;
    tonic_prost_build::configure().include_file("containerd.rs").compile_fds(descriptors)?;
    Ok(())
}
