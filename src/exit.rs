//! The end of a process while threads are at work.

/// Ends the process at once with this code, without running exit handlers or destructors.
///
/// This is for a second Ctrl-C. [`std::process::exit`] runs exit handlers, which unload the graphics driver while
/// threads may be inside it, as they are while kernels are compiled. The process then crashes or hangs. What was printed
/// without a line's end may be lost.
pub fn at_once(code: i32) -> ! {
    #[cfg(unix)]
    // SAFETY: this is the function of POSIX, which may be called at any time and does not return.
    unsafe {
        _exit(code)
    }
    #[cfg(windows)]
    // SAFETY: these are functions of kernel32, and the handle of the own process is always valid.
    unsafe {
        TerminateProcess(GetCurrentProcess(), code as u32);
    }
    #[cfg(not(unix))]
    std::process::exit(code)
}

#[cfg(unix)]
unsafe extern "C" {
    fn _exit(code: i32) -> !;
}

#[cfg(windows)]
#[link(name = "kernel32")]
unsafe extern "system" {
    fn GetCurrentProcess() -> *mut std::ffi::c_void;
    fn TerminateProcess(process: *mut std::ffi::c_void, code: u32) -> i32;
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::process::Command;

    /// Set in the child process of the test.
    const CHILD: &str = "TIEBEAM_TEST_EXIT";

    unsafe extern "C" {
        fn atexit(handler: extern "C" fn()) -> i32;
    }

    extern "C" fn handler() {
        std::process::abort();
    }

    #[test]
    fn no_exit_handler_runs() {
        if std::env::var_os(CHILD).is_some() {
            // SAFETY: the handler is a function that lives as long as the process.
            assert_eq!(unsafe { atexit(handler) }, 0);
            at_once(130);
        }
        let mut child = Command::new(std::env::current_exe().unwrap());
        let child = child.args(["--exact", "exit::tests::no_exit_handler_runs"]).env(CHILD, "1");
        assert_eq!(child.output().unwrap().status.code(), Some(130));
    }
}
