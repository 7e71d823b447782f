//! The bytes of a plan.
#![allow(clippy::todo)]

pub(super) fn emit(_plan: &super::plan::Plan) -> Vec<u8> {
    todo!()
}
