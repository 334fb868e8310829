//! Files and folders written whole or not at all.
//!
//! [`replace()`] and [`replace_folder`] are what every writer of this crate goes through; [`check`] and [`check_folder`] say
//! before long work what they would refuse.

mod folder;
mod manifest;
mod replace;
#[cfg(test)]
#[path = "../../tests/support/folder.rs"]
pub(crate) mod scratch;

pub use folder::{check_folder, replace_folder};
pub use manifest::MANIFEST;
pub use replace::{append, check, replace, replace_with};
