//! Tells what a file is that is no safetensors file, and what to do with it.

/// The line that turns a file of PyTorch into safetensors. `weights_only` keeps it from executing anything that is in the file.
const CONVERSION: &str = "python -c \"import sys, torch; from safetensors.torch import save_file; \
     save_file({k: v.clone().contiguous() for k, v in torch.load(sys.argv[1], map_location='cpu', \
     weights_only=True).items()}, sys.argv[2], {'format': 'pt'})\" IN.bin model.safetensors (of several files, each becomes \
     model-00001-of-00002.safetensors and so on)";

/// What to do with weights of PyTorch, which are a pickle: a program, of which this crate executes none.
pub(super) fn pytorch() -> String {
    format!(
        "these are weights of PyTorch's own format, a pickle, which is a program that this crate does not run; convert them once: \
         {CONVERSION}"
    )
}

/// Recognises other formats by their first bytes, of a file that is no safetensors file.
pub(super) fn described(bytes: &[u8]) -> Option<String> {
    let begins = |with: &[u8]| bytes.starts_with(with);
    let page = |bytes: &[u8]| {
        let start = bytes.iter().take_while(|b| b.is_ascii_whitespace()).count();
        let word: Vec<u8> = bytes[start..].iter().take(9).map(u8::to_ascii_lowercase).collect();
        word.starts_with(b"<!doctype") || word.starts_with(b"<html")
    };
    // A pickle begins with its protocol, and PyTorch's newer files are zip archives of one.
    // Zeros behind them are of a length, of a safetensors file that was cut short.
    let is_length = bytes.get(4..8).is_some_and(|rest| rest.iter().all(|&b| b == 0));
    let pickle = bytes.len() > 2 && bytes[0] == 0x80 && (2..=5).contains(&bytes[1]) && !is_length;
    Some(match () {
        () if begins(b"version https://git-lfs") => {
            "it is a pointer of Git LFS in the place of the file; run `git lfs pull` in its repository".into()
        }
        () if begins(b"PK\x03\x04") || pickle => pytorch(),
        () if begins(b"GGUF") => "it is a GGUF file; `tiebeam run` and `tiebeam inspect` read it".into(),
        () if begins(b"\x89HDF\r\n") => {
            "it is an HDF5 file, as Keras writes it; convert it with the program that wrote it".into()
        }
        () if begins(b"\x93NUMPY") => "it is a NumPy array; `tiebeam::store::load_npy` reads it".into(),
        () if page(bytes) => {
            "it is a web page that was saved under this name; download the file itself again".into()
        }
        () if begins(b"{") => {
            "it is JSON; an index of shards has the name model.safetensors.index.json".into()
        }
        () => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_formats_are_recognised() {
        for (bytes, words) in [
            (&b"version https://git-lfs.github.com/spec/v1\noid sha256:0"[..], "git lfs pull"),
            (b"PK\x03\x04\x00\x00\x08\x08", "weights_only=True"),
            (b"\x80\x02}q\x00(X\x01", "weights_only=True"),
            (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
            (b"\x89HDF\r\n\x1a\n", "HDF5"),
            (b"\x93NUMPY\x01\x00", "load_npy"),
            (b"\n<!DOCTYPE html><html>", "a web page"),
            (b"<HTML>", "a web page"),
            (b"{\"metadata\": {}}", "it is JSON"),
        ] {
            let found = described(bytes).unwrap_or_default();
            assert!(found.contains(words), "{bytes:?}: {found}");
        }
        assert_eq!(described(&100_000_001u64.to_le_bytes()), None);
        assert_eq!(described(&[&0x280u64.to_le_bytes()[..], b"{"].concat()), None);
        assert_eq!(described(b""), None);
        assert_eq!(described(b" "), None);
    }
}
