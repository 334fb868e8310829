//! Atomic writes of files: special files, links, long names, owner and mode, and leftovers of killed processes.

use crate::support::folder::{Folder, names};
use std::fs::{File, read, read_to_string, write};
use std::io::Write;
use std::path::Path;
use tiebeam::files::{append, check, replace, replace_with};
use tiebeam::{Error, Result};

fn refused<T>(result: Result<T>) -> String {
    result.err().expect("this is refused").to_string()
}

#[test]
fn names_as_long_as_names_can_be() {
    let folder = Folder::new("long");
    let names = [64, 65, 230, 255].map(|n| "n".repeat(n)).into_iter().chain(["é".repeat(127)]);
    for name in names {
        let path = folder.join(&name);
        for text in ["first", "second"] {
            check(&path).unwrap();
            replace_with(&path, text).unwrap();
            assert_eq!(read_to_string(&path).unwrap(), text);
        }
        assert_eq!(folder.names(), [name]);
        std::fs::remove_file(path).unwrap();
    }
    // A name beyond the system's limit is an error, and leaves no file.
    assert!(replace_with(&folder.join("n".repeat(256)), "x").is_err());
    assert!(folder.names().is_empty());
}

#[test]
fn errors_leave_the_old_file() {
    let folder = Folder::new("errors");
    let path = folder.join("m");
    replace_with(&path, "old").unwrap();
    let stop = |mut file: &File| {
        file.write_all(b"half").unwrap();
        Err(Error::stopped("stopped"))
    };
    assert_eq!(refused(replace(&path, stop)), "stopped");
    assert_eq!((read_to_string(&path).unwrap().as_str(), folder.names()), ("old", vec!["m".to_string()]));
    for (bad, words) in [("no/such", "make it first"), ("", "folder"), ("m/x", "m")] {
        assert!(refused(replace_with(&folder.join(bad), "x")).contains(words), "{bad}");
        assert!(check(&folder.join(bad)).is_err(), "{bad}");
    }
    assert_eq!(folder.names(), ["m"]);
}

#[test]
fn lines_are_added() {
    let folder = Folder::new("append");
    let path = folder.join("lines");
    append(&path, "one\n").unwrap();
    append(&path, "two\n").unwrap();
    assert_eq!(read_to_string(&path).unwrap(), "one\ntwo\n");
}

/// Only files with exactly our names are removed, and only if no process has them locked.
#[test]
fn leftovers_of_killed_processes_are_removed() {
    let folder = Folder::new("leftovers");
    let path = folder.join("m");
    let gone = [".m.123-0.tmp", ".m.99999999-17.tmp"];
    let stay =
        [".m.1-.tmp", ".m.a-1.tmp", ".m.1.tmp", ".m.1-2.tmp.x", ".mm.1-2.tmp", "m.1-2.tmp", ".m.7-7.tmp"];
    gone.iter().chain(&stay).for_each(|name| write(folder.join(name), "x").unwrap());
    std::fs::create_dir(folder.join(".m.5-5.tmp")).unwrap();
    let held = File::options().write(true).open(folder.join(".m.7-7.tmp")).unwrap();
    held.lock().unwrap();
    replace_with(&path, "new").unwrap();
    let mut want: Vec<&str> = stay.into_iter().chain(["m", ".m.5-5.tmp"]).collect();
    want.sort();
    assert_eq!(folder.names(), want);
    // Closing the file would not be enough, because a child of another test has a copy of it until its program runs.
    held.unlock().unwrap();
    // A file that is being written is locked, so the inner call leaves it.
    replace(&path, |_| replace_with(&path, "inner")).unwrap();
    want.retain(|name| *name != ".m.7-7.tmp");
    assert_eq!(folder.names(), want);
}

const CHILD: &str = "TIEBEAM_TEST_WRITES";

/// A child process, which runs this same test, is killed in the middle of writing a file.
#[test]
fn a_killed_writer_leaves_nothing_for_long() {
    if let Some(path) = std::env::var_os(CHILD) {
        let _ = replace(Path::new(&path), |mut file| {
            file.write_all(&[7; 1000]).unwrap();
            println!("\nwriting");
            std::thread::sleep(std::time::Duration::from_secs(60));
            Ok(())
        });
        return;
    }
    let folder = Folder::new("killed");
    let path = folder.join("m");
    replace_with(&path, "old").unwrap();
    for _ in 0..3 {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["files::a_killed_writer_leaves_nothing_for_long", "--exact", "--nocapture"])
            .env(CHILD, &path)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let said = std::io::BufReader::new(child.stdout.take().unwrap());
        assert!(std::io::BufRead::lines(said).any(|line| line.unwrap() == "writing"));
        // While the child lives, its file is not removed.
        replace_with(&path, "meanwhile").unwrap();
        assert_eq!(folder.names().len(), 2);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((read(&path).unwrap(), folder.names().len()), (b"meanwhile".to_vec(), 2));
    }
    replace_with(&path, "new").unwrap();
    assert_eq!(folder.names(), ["m"]);
}

#[cfg(unix)]
mod unix {
    use super::*;
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
    use std::process::Command;

    fn made(command: &str, args: &[&str], path: &Path) -> bool {
        let run = Command::new(command).arg(path).args(args).stderr(std::process::Stdio::null()).status();
        run.is_ok_and(|status| status.success())
    }

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().mode() & 0o7777
    }

    #[test]
    fn a_pipe_is_written_through_and_stays_a_pipe() {
        let folder = Folder::new("pipe");
        let path = folder.join("pipe");
        assert!(made("mkfifo", &[], &path));
        check(&path).unwrap();
        assert!(refused(replace_with(&path, "x")).contains("nobody reads from there"));
        // More bytes than a pipe can hold, so the writer must wait for the reader. Also through a link.
        let link = folder.join("link");
        symlink("pipe", &link).unwrap();
        let bytes: Vec<u8> = (0..300_000u32).map(|i| i as u8).collect();
        for to in [&path, &link] {
            let from = path.clone();
            let reader = std::thread::spawn(move || read(from).unwrap());
            // The pipe is refused until the reader has opened it.
            while let Err(e) = replace_with(to, &bytes) {
                assert!(e.to_string().contains("nobody reads"), "{e}");
                std::thread::yield_now();
            }
            assert_eq!(reader.join().unwrap(), bytes);
        }
        assert!(path.symlink_metadata().unwrap().file_type().is_fifo());
        assert_eq!(folder.names(), ["link", "pipe"]);
    }

    #[test]
    fn a_device_is_written_through_and_stays_a_device() {
        let folder = Folder::new("device");
        let own = folder.join("full");
        // Uses its own node if it may create one. A process that may not cannot damage the machine's node either.
        let ours = made("mknod", &["c", "1", "7"], &own) && File::options().write(true).open(&own).is_ok();
        let path = if ours { own.as_path() } else { Path::new("/dev/full") };
        if !path.exists() {
            // Only Linux has this device.
            return;
        }
        check(path).unwrap();
        replace(path, |_| Ok(())).unwrap();
        assert!(matches!(replace_with(path, "x"), Err(Error::Io { .. })), "a full device is an error");
        assert!(path.symlink_metadata().unwrap().file_type().is_char_device());
        let null = folder.join("null");
        if made("mknod", &["c", "1", "3"], &null) && File::options().write(true).open(&null).is_ok() {
            replace_with(&null, "x").unwrap();
            append(&null, "x").unwrap();
            assert!(null.symlink_metadata().unwrap().file_type().is_char_device());
        }
    }

    #[test]
    fn sockets_and_disks_are_refused_by_name() {
        let folder = Folder::new("socket");
        let path = folder.join("s");
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let mut cases = vec![(path, "s: this is a socket; name a file")];
        let disk = folder.join("disk");
        // No driver has major number 240.
        if made("mknod", &["b", "240", "0"], &disk) {
            cases.push((disk, "disk: this is a block device; name a file"));
        }
        for (path, words) in cases {
            for result in [check(&path), replace_with(&path, "x"), append(&path, "x")] {
                let message = refused(result);
                assert!(message.contains(words), "{message}");
            }
            assert!(!path.symlink_metadata().unwrap().is_file());
        }
    }

    #[test]
    fn links_are_followed_and_stay_links() {
        let folder = Folder::new("links");
        for name in ["a", "b"] {
            std::fs::create_dir(folder.join(name)).unwrap();
        }
        write(folder.join("b/file"), "old").unwrap();
        symlink("../b/file", folder.join("a/inner")).unwrap();
        symlink("a/inner", folder.join("chain")).unwrap();
        symlink(folder.join("b/new"), folder.join("dangling")).unwrap();
        for (link, target) in [("chain", "b/file"), ("dangling", "b/new")] {
            let link = folder.join(link);
            for text in ["first", "second"] {
                check(&link).unwrap();
                replace(&link, |mut file| {
                    let temporary = names(&folder.join("b")).iter().any(|name| name.ends_with(".tmp"));
                    assert!(temporary, "the temporary file lies beside the target");
                    file.write_all(text.as_bytes()).unwrap();
                    Ok(())
                })
                .unwrap();
                assert_eq!(read_to_string(folder.join(target)).unwrap(), text);
                assert!(link.is_symlink() && !folder.join(target).is_symlink());
            }
        }
        append(&folder.join("chain"), " and more").unwrap();
        assert_eq!(read_to_string(folder.join("b/file")).unwrap(), "second and more");
        symlink("loop", folder.join("loop")).unwrap();
        symlink("no/such", folder.join("lost")).unwrap();
        symlink("b", folder.join("folder")).unwrap();
        for (link, words) in
            [("loop", "symbolic links"), ("lost", "no is not there"), ("folder", "is a folder")]
        {
            for result in [check(&folder.join(link)), replace_with(&folder.join(link), "x")] {
                let message = refused(result);
                assert!(message.contains(words), "{message}");
            }
            assert!(folder.join(link).is_symlink());
        }
        assert_eq!(names(&folder.join("b")), ["file", "new"]);
    }

    #[test]
    fn owner_and_mode_of_a_replaced_file_stay() {
        let folder = Folder::new("owner");
        let path = folder.join("m");
        replace_with(&path, "first").unwrap();
        let plain = folder.join("plain");
        write(&plain, "").unwrap();
        assert_eq!(mode(&path), mode(&plain), "a new file is as the system makes them");
        for bits in [0o600, 0o644, 0o660, 0o751, 0o444, 0o4755, 0o2755] {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(bits)).unwrap();
            replace(&path, |file| {
                // Only the owner may read a file that is being written.
                assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o600);
                Ok(())
            })
            .unwrap();
            assert_eq!(mode(&path), bits);
        }
        if chown(&path, Some(4321), Some(8765)).is_ok() {
            for bits in [0o640, 0o6755] {
                std::fs::set_permissions(&path, PermissionsExt::from_mode(bits)).unwrap();
                replace_with(&path, "second").unwrap();
                let found = path.metadata().unwrap();
                assert_eq!((found.uid(), found.gid(), mode(&path)), (4321, 8765, bits));
            }
        }
    }
}
