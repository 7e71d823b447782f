//! OCI image layout directories.
