//! Writes files and folders atomically.
//!
//! Every writer of this crate uses [`replace()`] or [`replace_folder`]. [`check`] and [`check_folder`] report before long work
//! what these would refuse.

mod folder;
mod manifest;
mod replace;
#[cfg(test)]
#[path = "../../tests/support/folder.rs"]
pub(crate) mod scratch;
mod size;

pub use folder::{check_folder, is_ours, replace_folder};
pub use manifest::MANIFEST;
pub use replace::{append, check, replace, replace_with};
pub use size::{parse_size, size};
