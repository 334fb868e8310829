//! Code that the examples share: printing errors, and handling Ctrl-C.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tiebeam::error::ErrorKind;
use tiebeam::{Error, Result};

/// Runs an example's body with logging. An error is printed as a message, and the exit code says that it failed.
pub fn main(body: impl FnOnce() -> Result<()>) -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or("error,tiebeam=warn".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    match body() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            // 130 is the exit code that shells expect of a program that Ctrl-C ended.
            if error.kind() == ErrorKind::Stopped { ExitCode::from(130) } else { ExitCode::FAILURE }
        }
    }
}

/// Returns a flag that Ctrl-C sets. A second Ctrl-C ends the process.
pub fn interruptible() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let handler = move || {
        if flag.swap(true, Ordering::SeqCst) {
            tiebeam::exit::at_once(130);
        }
    };
    let caught = ctrlc::set_handler(handler);
    caught.map_err(|e| Error::config(format!("Ctrl-C cannot be caught: {e}")))?;
    Ok(stop)
}
