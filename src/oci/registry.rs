//! A thin registry client: manifests, configurations and layers by the OCI distribution specification, anonymously.
