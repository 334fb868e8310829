//! Errors that the program cannot prevent, each with a message that says what to do.
//!
//! Misuse of shapes and dtypes is not included. It is a bug of the caller and panics at the caller's line.

use std::fmt;
use std::path::{Path, PathBuf};

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can fail through no fault of the program: adapter, memory, limits, files, the device.
#[derive(Clone, Debug)]
pub enum Error {
    /// There is no adapter, or none that matches the request.
    NoAdapter {
        /// What was asked for, and which adapters there are.
        message: String,
    },
    /// The adapter lacks something that the engine cannot work without.
    Unsupported {
        /// What is needed, and by whom.
        need: String,
    },
    /// Something is larger than the adapter allows. Nothing was dispatched.
    Limit {
        /// The op and the quantity, such as `matmul: bytes of one binding`.
        what: String,
        /// What the op needs.
        need: u64,
        /// What the adapter has.
        have: u64,
    },
    /// Ids are outside the table that they index. This is only found if the device checks ids (`Options::checked`,
    /// `TIEBEAM_CHECKED=1`, debug builds), and the next readback reports it once. The op's documentation says what its
    /// result is.
    Outside {
        /// The op.
        op: String,
        /// The row-major index of the first such id among the ids.
        place: u64,
        /// The id there.
        id: i64,
        /// Ids must be in `0..size`.
        size: u64,
        /// How many ids are outside.
        count: u64,
    },
    /// A shader failed to assemble, parse, validate or become a pipeline.
    Shader {
        /// The kernel's file or generated name.
        file: String,
        /// Line in that file, counted from 1. 0 means unknown.
        line: u32,
        /// The compiler's message.
        message: String,
    },
    /// The device was lost, ran out of memory or reported an error.
    Device {
        /// The op that was running, if known, and the driver's message.
        message: String,
    },
    /// A file could not be read or written.
    Io {
        /// The file.
        path: PathBuf,
        /// The system's message, or ours.
        message: String,
    },
    /// A file's content is wrong, such as a header that does not match the data, a missing tensor, or the checkpoint of
    /// another model.
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the name of the tensor if there is one.
        message: String,
    },
    /// A setting that the user chose cannot work.
    Config {
        /// The setting, and values that would work.
        message: String,
    },
}

impl Error {
    pub(crate) fn io(path: impl AsRef<Path>, error: std::io::Error) -> Self {
        Error::Io { path: path.as_ref().to_path_buf(), message: error.to_string() }
    }

    pub(crate) fn format(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Error::Format { path: path.as_ref().to_path_buf(), message: message.into() }
    }

    pub(crate) fn config(message: impl Into<String>) -> Self {
        Error::Config { message: message.into() }
    }

    pub(crate) fn device(message: impl Into<String>) -> Self {
        Error::Device { message: message.into() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::NoAdapter { message } => write!(f, "no GPU adapter: {message}"),
            Error::Unsupported { need } => write!(f, "this adapter cannot run it: {need}"),
            Error::Limit { what, need, have } => {
                write!(
                    f,
                    "{what}: need {need}, this adapter has {have}; use smaller sizes or another adapter"
                )
            }
            Error::Outside { op, place, id, size, count } => {
                let ids = if *count == 1 { "id" } else { "ids" };
                write!(f, "{op}: id {id} at place {place} is outside 0..{size}; {count} such {ids}")
            }
            Error::Shader { file, line: 0, message } => write!(f, "shader {file}: {message}"),
            Error::Shader { file, line, message } => write!(f, "shader {file}:{line}: {message}"),
            Error::Device { message } => write!(f, "device: {message}"),
            Error::Io { path, message } | Error::Format { path, message } => {
                write!(f, "{}: {message}", path.display())
            }
            Error::Config { message } => f.write_str(message),
        }
    }
}

impl std::error::Error for Error {}
