//! The header of an array: a Python dictionary of three keys, which says type, order and shape.

use super::super::FileDType;

/// The first bytes of every array.
pub const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// The longest dictionary that is read. NumPy has the same limit for files that it is not told to trust.
pub const MAX_BYTES: usize = 10_000;

/// What a header says about the data behind it.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    pub dtype: FileDType,
    /// Whether the bytes of an element stand in the order of their weight, the highest first.
    pub big_endian: bool,
    /// Whether the first axis is the one that varies fastest.
    pub fortran_order: bool,
    pub shape: Vec<usize>,
}

impl Header {
    /// Reads the dictionary, such as `{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }`.
    pub fn parse(text: &str) -> Result<Header, String> {
        let mut rest = Rest(text);
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        rest.expect("{")?;
        while !rest.take("}") {
            let key = rest.string()?;
            rest.expect(":")?;
            let twice = match key {
                "descr" => descr.replace(rest.descr()?).is_some(),
                "fortran_order" => fortran_order.replace(rest.truth()?).is_some(),
                "shape" => shape.replace(rest.shape()?).is_some(),
                _ => return Err(format!("its header has the key '{key}', which the format does not know")),
            };
            if twice {
                return Err(format!("its header has the key '{key}' twice"));
            }
            if !rest.take(",") {
                rest.expect("}")?;
                break;
            }
        }
        if !rest.0.trim().is_empty() {
            return Err(rest.unexpected("the end"));
        }
        let missing = |key| format!("its header has no key '{key}'");
        let (dtype, big_endian) = descr.ok_or_else(|| missing("descr"))?;
        let fortran_order = fortran_order.ok_or_else(|| missing("fortran_order"))?;
        let shape = shape.ok_or_else(|| missing("shape"))?;
        Ok(Header { dtype, big_endian, fortran_order, shape })
    }

    /// Returns everything before the data of a row-major array: magic, version, length and dictionary. `None` for a type that has
    /// no name in NumPy.
    pub fn write(dtype: FileDType, shape: &[usize]) -> Option<Vec<u8>> {
        let &(name, _) = TYPES.iter().find(|(_, known)| *known == dtype)?;
        // A type of one byte has no order of bytes.
        let order = if dtype.bits() == 8 { '|' } else { '<' };
        let shape = match shape {
            [one] => format!("({one},)"),
            _ => format!("({})", shape.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")),
        };
        let text = format!("{{'descr': '{order}{name}', 'fortran_order': False, 'shape': {shape}, }}");
        // Blanks and a line's end fill up to a multiple of 64 bytes, so that the data are aligned.
        let before = MAGIC.len() + 4;
        let length = (before + text.len() + 1).next_multiple_of(64) - before;
        let mut bytes = MAGIC.to_vec();
        bytes.extend([1, 0]);
        // At most MAX_AXES sizes of 20 digits each, so the length fits 16 bits.
        bytes.extend(u16::try_from(length).ok()?.to_le_bytes());
        bytes.extend(format!("{text:width$}\n", width = length - 1).bytes());
        Some(bytes)
    }
}

/// NumPy's names of the types that are read, without the order of bytes.
const TYPES: [(&str, FileDType); 12] = [
    ("b1", FileDType::Bool),
    ("u1", FileDType::U8),
    ("i1", FileDType::I8),
    ("u2", FileDType::U16),
    ("i2", FileDType::I16),
    ("u4", FileDType::U32),
    ("i4", FileDType::I32),
    ("u8", FileDType::U64),
    ("i8", FileDType::I64),
    ("f2", FileDType::F16),
    ("f4", FileDType::F32),
    ("f8", FileDType::F64),
];

/// Returns the type that NumPy calls `name`, such as `<f4`, and whether its bytes are swapped.
fn dtype(name: &str) -> Result<(FileDType, bool), String> {
    let kind = name.strip_prefix(['<', '>', '|', '=']).unwrap_or(name);
    if let Some((_, dtype)) = TYPES.iter().find(|(known, _)| *known == kind) {
        return Ok((*dtype, name.starts_with('>')));
    }
    Err(match kind.chars().next() {
        Some('O') => {
            "it holds Python objects (pickle), which would run code to be read; save an array of numbers"
                .into()
        }
        Some('V') => format!(
            "its elements are '{name}', bytes without a type; bfloat16 of ml_dtypes is written so: save it as float32"
        ),
        _ => format!("its elements are '{name}', which no tensor can hold; convert them with astype first"),
    })
}

/// What is left of a dictionary's text.
struct Rest<'a>(&'a str);

impl<'a> Rest<'a> {
    /// Takes `word` after any blanks. False, and nothing is taken, if something else follows.
    fn take(&mut self, word: &str) -> bool {
        self.0 = self.0.trim_start();
        match self.0.strip_prefix(word) {
            Some(rest) => {
                self.0 = rest;
                true
            }
            None => false,
        }
    }

    fn expect(&mut self, word: &str) -> Result<(), String> {
        if self.take(word) { Ok(()) } else { Err(self.unexpected(&format!("`{word}`"))) }
    }

    fn unexpected(&self, wanted: &str) -> String {
        let found: String = self.0.trim_start().chars().take(20).collect();
        format!("its header has {found:?} where {wanted} was expected")
    }

    /// A text in quotes. Escapes do not occur in what is read here.
    fn string(&mut self) -> Result<&'a str, String> {
        let quote = if self.take("'") {
            '\''
        } else if self.take("\"") {
            '"'
        } else {
            return Err(self.unexpected("a text"));
        };
        let (text, rest) = self.0.split_once(quote).ok_or_else(|| self.unexpected("a text with its end"))?;
        self.0 = rest;
        Ok(text)
    }

    fn descr(&mut self) -> Result<(FileDType, bool), String> {
        if self.take("[") {
            return Err("its elements are records of several fields; save each field as an array".into());
        }
        dtype(self.string()?)
    }

    fn truth(&mut self) -> Result<bool, String> {
        match (self.take("True"), self.take("False")) {
            (true, false) => Ok(true),
            (false, true) => Ok(false),
            _ => Err(self.unexpected("True or False")),
        }
    }

    /// A tuple of sizes. Python 2 wrote a long number as `3L`.
    fn shape(&mut self) -> Result<Vec<usize>, String> {
        let mut sizes = Vec::new();
        self.expect("(")?;
        while !self.take(")") {
            self.0 = self.0.trim_start();
            let digits = self.0.len() - self.0.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let (number, rest) = self.0.split_at(digits);
            if number.is_empty() {
                return Err(self.unexpected("a size"));
            }
            sizes.push(
                number
                    .parse()
                    .map_err(|_| format!("its header has the size {number}, which is too large"))?,
            );
            self.0 = rest;
            self.take("L");
            if !self.take(",") {
                self.expect(")")?;
                break;
            }
        }
        Ok(sizes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dictionaries_are_read() {
        let read = |text: &str| Header::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
        let header = read("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }   \n");
        let want =
            Header { dtype: FileDType::F32, big_endian: false, fortran_order: false, shape: vec![2, 3] };
        assert_eq!(header, want);
        // Another order of keys, other quotes, no blanks, and numbers of Python 2.
        let header = read("{\"shape\":(3L,),\"fortran_order\":True,\"descr\":\">i8\"}");
        let want = Header { dtype: FileDType::I64, big_endian: true, fortran_order: true, shape: vec![3] };
        assert_eq!(header, want);
        assert!(read("{'descr': '|b1', 'fortran_order': False, 'shape': ()}").shape.is_empty());
    }

    #[test]
    fn wrong_dictionaries_are_refused() {
        let good = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}";
        for cut in 0..good.len() {
            Header::parse(&good[..cut]).expect_err(&good[..cut]);
        }
        let parens = "(".repeat(9000);
        let deep = format!("{{'shape': {parens}");
        for (text, words) in [
            ("{'descr': '|O', 'fortran_order': False, 'shape': (2,)}", "pickle"),
            ("{'descr': '|V2', 'fortran_order': False, 'shape': (2,)}", "bfloat16"),
            ("{'descr': '<c8', 'fortran_order': False, 'shape': (2,)}", "'<c8'"),
            ("{'descr': '<f16', 'fortran_order': False, 'shape': (2,)}", "'<f16'"),
            ("{'descr': '<U5', 'fortran_order': False, 'shape': (2,)}", "'<U5'"),
            ("{'descr': '', 'fortran_order': False, 'shape': (2,)}", "''"),
            ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,)}", "records"),
            ("{'descr': '<f4', 'fortran_order': 1, 'shape': (2,)}", "True or False"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}", "a size"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,)}", "too large"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': 2}", "`(`"),
            ("{'descr': '<f4', 'fortran_order': False}", "no key 'shape'"),
            ("{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': ()}", "'descr' twice"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (), 'x': 1}", "key 'x'"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': ()} x", "the end"),
            (deep.as_str(), "a size"),
        ] {
            let message = Header::parse(text).expect_err(text);
            assert!(message.contains(words), "{text}: {message}");
        }
    }

    #[test]
    fn what_is_written_is_read() {
        for (_, dtype) in TYPES {
            for shape in [&[][..], &[0], &[2, 3], &[usize::MAX; 6]] {
                let bytes = Header::write(dtype, shape).unwrap();
                assert_eq!(bytes.len() % 64, 0);
                assert_eq!(bytes[..8], *b"\x93NUMPY\x01\x00");
                assert_eq!(usize::from(u16::from_le_bytes([bytes[8], bytes[9]])), bytes.len() - 10);
                let header = Header::parse(std::str::from_utf8(&bytes[10..]).unwrap()).unwrap();
                assert_eq!((header.dtype, &header.shape[..], header.fortran_order), (dtype, shape, false));
            }
        }
        assert!(Header::write(FileDType::BF16, &[1]).is_none());
    }
}
