//! The daemon without containerd: its two processes, and images from the store to the mount tree and back.

mod holder;
mod images;
mod made_store;
mod take_over;
mod view;
mod worker_kill;
