//! Errors that the program cannot prevent, each with a message that says what to do.
//!
//! Misuse of shapes and dtypes is not included. It is a bug of the caller and panics at the caller's line.

use std::any::Any;
use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The error of a library or of the system that caused one of ours.
pub type Cause = Arc<dyn StdError + Send + Sync>;

/// Everything that can fail through no fault of the program: adapter, memory, limits, files, the device.
///
/// The text (`Display`) is a sentence that says what to do, and contains the words of the cause. Programs decide by
/// [`Error::kind`], or match the variants for details. [`source`](StdError::source) returns the error of a library or of the
/// system that caused this one, if there is one, such as an [`io::Error`].
///
/// ```
/// use std::error::Error as _;
/// use std::io;
/// use tiebeam::error::ErrorKind;
///
/// let error = tiebeam::store::File::open("no/such/model.safetensors").err().unwrap();
/// assert_eq!(error.kind(), ErrorKind::Io);
/// let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>()).unwrap();
/// assert_eq!(cause.kind(), io::ErrorKind::NotFound);
/// assert!(error.to_string().starts_with("no/such/model.safetensors: "));
/// ```
#[derive(Clone)]
#[non_exhaustive]
pub enum Error {
    /// There is no adapter, or none that matches the request.
    #[non_exhaustive]
    NoAdapter {
        /// What was asked for, and which adapters there are.
        message: String,
    },
    /// The adapter lacks something that the engine cannot work without.
    #[non_exhaustive]
    Unsupported {
        /// What is needed, and by whom.
        need: String,
    },
    /// Something is larger than the adapter allows. Nothing was dispatched.
    #[non_exhaustive]
    Limit {
        /// The op and the quantity, such as `matmul: bytes of one binding`.
        what: String,
        /// What the op needs.
        need: u64,
        /// What the adapter has.
        have: u64,
    },
    /// The device has no memory for one buffer. The device itself works on.
    #[non_exhaustive]
    OutOfMemory {
        /// The op that asked.
        op: String,
        /// The buffer's size.
        bytes: u64,
        /// What is in use.
        message: String,
    },
    /// Ids are outside the table that they index. This is only found if the device checks ids (`Options::checked`,
    /// `TIEBEAM_CHECKED=1`, debug builds), and the next readback reports it once. The op's documentation says what its
    /// result is.
    #[non_exhaustive]
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
    #[non_exhaustive]
    Shader {
        /// The kernel's file or generated name.
        file: String,
        /// Line in that file, counted from 1. 0 means unknown.
        line: u32,
        /// The compiler's message.
        message: String,
        /// The driver's error, if the driver's compiler refused the shader.
        cause: Option<Cause>,
    },
    /// The device was lost: the driver took it away, or it was unplugged. It must be opened again.
    #[non_exhaustive]
    Lost {
        /// The driver's message.
        message: String,
    },
    /// The device did not answer, or its driver did not compile a kernel, within
    /// [`Options::wait`](crate::Options::wait). The work goes on, and a later call may find it done.
    #[non_exhaustive]
    Timeout {
        /// How long the program waited, and for what.
        message: String,
    },
    /// The device reported another error.
    #[non_exhaustive]
    Device {
        /// The op that was running, if known, and the driver's message.
        message: String,
        /// The driver's error, if there is one.
        cause: Option<Cause>,
    },
    /// A file could not be read or written.
    #[non_exhaustive]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's message, or ours.
        message: String,
        /// The system's [`io::Error`], if there is one.
        cause: Option<Cause>,
    },
    /// A file's content is wrong, such as a header that does not match the data, a missing tensor, or the checkpoint of
    /// another model.
    #[non_exhaustive]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the name of the tensor if there is one.
        message: String,
        /// The parser's error, if there is one.
        cause: Option<Cause>,
    },
    /// A setting that the user chose cannot work.
    #[non_exhaustive]
    Config {
        /// The setting, and values that would work.
        message: String,
        /// The error of a parser or of the system, if there is one.
        cause: Option<Cause>,
    },
    /// The user, or a caller's own function, asked for an end before the work was done.
    #[non_exhaustive]
    Stopped {
        /// What was kept, and how to go on.
        message: String,
    },
}

/// The kind of an [`Error`]: one word per variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// [`Error::NoAdapter`]
    NoAdapter,
    /// [`Error::Unsupported`]
    Unsupported,
    /// [`Error::Limit`]
    Limit,
    /// [`Error::OutOfMemory`]
    OutOfMemory,
    /// [`Error::Outside`]
    Outside,
    /// [`Error::Shader`]
    Shader,
    /// [`Error::Lost`]
    Lost,
    /// [`Error::Timeout`]
    Timeout,
    /// [`Error::Device`]
    Device,
    /// [`Error::Io`]
    Io,
    /// [`Error::Format`]
    Format,
    /// [`Error::Config`]
    Config,
    /// [`Error::Stopped`]
    Stopped,
}

impl Error {
    /// Returns the kind, which programs decide by.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::NoAdapter { .. } => ErrorKind::NoAdapter,
            Error::Unsupported { .. } => ErrorKind::Unsupported,
            Error::Limit { .. } => ErrorKind::Limit,
            Error::OutOfMemory { .. } => ErrorKind::OutOfMemory,
            Error::Outside { .. } => ErrorKind::Outside,
            Error::Shader { .. } => ErrorKind::Shader,
            Error::Lost { .. } => ErrorKind::Lost,
            Error::Timeout { .. } => ErrorKind::Timeout,
            Error::Device { .. } => ErrorKind::Device,
            Error::Io { .. } => ErrorKind::Io,
            Error::Format { .. } => ErrorKind::Format,
            Error::Config { .. } => ErrorKind::Config,
            Error::Stopped { .. } => ErrorKind::Stopped,
        }
    }

    /// Returns an [`Error::Io`] with the system's error as its cause. `io::Error::other` makes such an error from a sentence.
    pub fn io(path: impl AsRef<Path>, error: io::Error) -> Self {
        Error::Io {
            path: path.as_ref().to_path_buf(),
            message: error.to_string(),
            cause: Some(Arc::new(error)),
        }
    }

    /// Returns an [`Error::Format`].
    pub fn format(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Error::Format { path: path.as_ref().to_path_buf(), message: message.into(), cause: None }
    }

    /// Returns an [`Error::Config`].
    pub fn config(message: impl Into<String>) -> Self {
        Error::Config { message: message.into(), cause: None }
    }

    /// Returns an [`Error::Stopped`].
    pub fn stopped(message: impl Into<String>) -> Self {
        Error::Stopped { message: message.into() }
    }

    /// Returns an [`Error::Device`].
    pub fn device(message: impl Into<String>) -> Self {
        Error::Device { message: message.into(), cause: None }
    }

    /// Returns an [`Error::NoAdapter`].
    pub fn no_adapter(message: impl Into<String>) -> Self {
        Error::NoAdapter { message: message.into() }
    }

    pub(crate) fn shader(file: impl Into<String>, line: u32, message: impl Into<String>) -> Self {
        Error::Shader { file: file.into(), line, message: message.into(), cause: None }
    }

    /// Returns this error with its cause. Variants without a field `cause` are returned unchanged.
    #[must_use]
    pub fn because_of(mut self, error: impl StdError + Send + Sync + 'static) -> Self {
        match &mut self {
            Error::Shader { cause, .. }
            | Error::Device { cause, .. }
            | Error::Io { cause, .. }
            | Error::Format { cause, .. }
            | Error::Config { cause, .. } => *cause = Some(Arc::new(error)),
            _ => {}
        }
        self
    }
}

/// The sentence of `Display`, because that is what `main` prints of an error that it returns.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
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
            Error::OutOfMemory { op, bytes, message } => {
                write!(f, "{op}: out of device memory asking for {bytes} bytes; {message}")
            }
            Error::Outside { op, place, id, size, count } => {
                let ids = if *count == 1 { "id" } else { "ids" };
                write!(f, "{op}: id {id} at place {place} is outside 0..{size}; {count} such {ids}")
            }
            Error::Shader { file, line: 0, message, .. } => write!(f, "shader {file}: {message}"),
            Error::Shader { file, line, message, .. } => write!(f, "shader {file}:{line}: {message}"),
            Error::Lost { message } => write!(f, "the device was lost ({message}); open it again"),
            Error::Device { message, .. } | Error::Timeout { message } => write!(f, "device: {message}"),
            Error::Io { path, message, .. } | Error::Format { path, message, .. } => {
                write!(f, "{}: {message}", path.display())
            }
            Error::Config { message, .. } | Error::Stopped { message } => f.write_str(message),
        }
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Error::Shader { cause, .. }
            | Error::Device { cause, .. }
            | Error::Io { cause, .. }
            | Error::Format { cause, .. }
            | Error::Config { cause, .. } => {
                cause.as_ref().map(|cause| &**cause as &(dyn StdError + 'static))
            }
            _ => None,
        }
    }
}

/// The message of a panic that was caught.
pub(crate) fn panic_text(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("without a message")
}
