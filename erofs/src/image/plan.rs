//! Every number of an image.
#![allow(clippy::todo)]

use super::Checked;

pub(super) struct Plan;

impl Plan {
    pub fn new(checked: &Checked) -> Plan {
        let _ = (checked.tree(), checked.steps(), checked.nlink(crate::tree::Tree::ROOT));
        todo!()
    }
}
