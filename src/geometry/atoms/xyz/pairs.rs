//! The line of keys: `key=value` pairs as ASE reads them, and how they are written so that they read back.

/// A value, and how the line spells it.
#[derive(Debug, PartialEq)]
pub(super) struct Value<'a> {
    pub text: String,
    pub raw: &'a str,
}

/// A key with its value, or a word that stands alone.
pub(super) type Pair<'a> = (String, Option<Value<'a>>);

/// The most pairs and words of a line. A word takes many times its length in memory.
const MOST: usize = 1 << 16;

/// Splits a line into `key=value` pairs and words that stand alone.
///
/// Blanks may stand around `=`. A key or value in double or single quotes, braces or brackets may have blanks, and a backslash
/// takes the character after it as it is. Outer quotes, braces and brackets are no part of a value, except those of an array
/// within an array, such as `[[1, 2], [3, 4]]`.
pub(super) fn pairs(line: &str) -> Result<Vec<Pair<'_>>, String> {
    let mut all = Vec::new();
    let mut rest = line.trim();
    while !rest.is_empty() {
        let (key, after) = key(rest);
        if key.is_empty() {
            return Err("a value without a key".into());
        }
        if all.len() == MOST {
            return Err(format!("the line has more than {MOST} keys and words"));
        }
        rest = after.trim_start();
        let Some(after) = rest.strip_prefix('=') else {
            all.push((key, None));
            continue;
        };
        let begin = after.trim_start();
        let (mut whole, after) = value(&key, begin)?;
        let mut end = after;
        rest = after.trim_start();
        // A plain comment may say `a = b = c`. What follows a second `=` is still the value.
        while let Some(after) = rest.strip_prefix('=') {
            let (more, after) = value(&key, after.trim_start())?;
            whole.push('=');
            whole.push_str(&more);
            end = after;
            rest = after.trim_start();
        }
        let raw = &begin[..begin.len() - end.len()];
        all.push((key, Some(Value { text: whole, raw })));
    }
    Ok(all)
}

/// Splits a key from the rest: the content of quotes, or a word up to `=`.
fn key(text: &str) -> (String, &str) {
    if text.starts_with(['"', '\'']) {
        // A quote that does not close, as in a plain comment, belongs to a word.
        if let Some((key, after)) = enclosed(text)
            && (after.is_empty() || after.starts_with(|c: char| c == '=' || c.is_whitespace()))
        {
            return (key, after);
        }
    }
    word(text, |c| c == '=' || c.is_whitespace())
}

/// Splits a value from the rest: words and enclosures up to a blank, as in `"1 2"` and `name"two words"`.
fn value<'a>(key: &str, text: &'a str) -> Result<(String, &'a str), String> {
    let (mut whole, mut rest) = (String::new(), text);
    loop {
        let (part, after) = word(rest, |c| c.is_whitespace() || OPEN.contains(&c));
        whole += &part;
        let Some(open) = after.chars().next().filter(|c| OPEN.contains(c)) else { return Ok((whole, after)) };
        let (part, after) = enclosed(after)
            .ok_or_else(|| format!("the value of `{key}` has no closing `{}`", closing(open)))?;
        whole += &part;
        rest = after;
    }
}

/// What begins an enclosure.
const OPEN: [char; 4] = ['"', '\'', '{', '['];

fn closing(open: char) -> char {
    match open {
        '{' => '}',
        '[' => ']',
        quote => quote,
    }
}

/// Splits off a word. A backslash takes the character after it into the word.
fn word(text: &str, ends: impl Fn(char) -> bool) -> (String, &str) {
    let (mut found, mut escaped) = (String::new(), false);
    for (at, c) in text.char_indices() {
        match c {
            c if escaped => {
                found.push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            c if ends(c) => return (found, &text[at..]),
            c => found.push(c),
        }
    }
    (found, "")
}

/// Splits off what the first character encloses. `None` if the enclosure does not close.
fn enclosed(text: &str) -> Option<(String, &str)> {
    let open = text.chars().next()?;
    let close = closing(open);
    let (mut found, mut depth, mut deepest, mut escaped) = (String::new(), 1, 1, false);
    for (at, c) in text.char_indices().skip(1) {
        match c {
            c if escaped => {
                found.push(c);
                escaped = false;
                continue;
            }
            '\\' => {
                escaped = true;
                continue;
            }
            c if c == close => depth -= 1,
            c if c == open => depth += 1,
            _ => {}
        }
        deepest = deepest.max(depth);
        if depth == 0 {
            let after = &text[at + c.len_utf8()..];
            // Without its outer brackets, an array of arrays would no longer say where it begins.
            return Some((if open == '[' && deepest > 1 { format!("[{found}]") } else { found }, after));
        }
        found.push(c);
    }
    None
}

/// Returns `key=value` as text that [`pairs`] and ASE read as this key and value.
pub(super) fn pair(key: &str, value: &str) -> Result<String, String> {
    if key.is_empty() || key.contains(['\n', '\r']) {
        return Err(format!("{key:?} cannot be a key: it is empty or has a line end"));
    }
    if value.contains(['\n', '\r']) {
        return Err(format!("the value of `{key}` has a line end; leave it out"));
    }
    Ok(format!("{}={}", named(key), spelt(value)))
}

/// A key as it is written.
pub(super) fn named(key: &str) -> String {
    if key.chars().all(is_plain) { key.to_string() } else { quoted(key) }
}

/// A value as it is written if there is no other spelling: bare if it is one word, as other readers take a number or flag in quotes for
/// a text.
pub(super) fn spelt(value: &str) -> String {
    // An array of arrays in quotes would be a string to other readers.
    let array = value.starts_with("[[") && enclosed(value) == Some((value.to_string(), ""));
    let word = !value.is_empty() && value.chars().all(|c| is_plain(c) && c.is_ascii_graphic());
    if array || word { value.to_string() } else { quoted(value) }
}

/// Whether `raw` can be written as the value of a key, so that it reads back as `value`.
pub(super) fn reads_as(raw: &str, value: &str) -> bool {
    // The key after it shows whether the spelling ends by itself.
    let line = format!("a={raw} b=c");
    !raw.contains(['\n', '\r'])
        && pairs(&line).is_ok_and(|all| {
            matches!(&all[..], [(a, Some(found)), (b, Some(_))] if a == "a" && b == "b" && found.text == value)
        })
}

fn is_plain(c: char) -> bool {
    !(c.is_whitespace() || "=\"'{}[]\\,".contains(c))
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// The words of a list: numbers or flags with blanks, commas and brackets between them, as in `1 2 3`, `[[1, 2], [3, 4]]` and the
/// text `_JSON [1, 2]`, in which ASE writes what it has no other form for.
pub(super) fn words(text: &str) -> impl Iterator<Item = &str> {
    let text = text.trim();
    let text = text.strip_prefix("_JSON ").unwrap_or(text).trim();
    // A single bracket is no list.
    let brackets = text.starts_with('[') && text.ends_with(']');
    let between = move |c: char| c.is_whitespace() || c == ',' || brackets && "[]".contains(c);
    text.split(between).filter(|word| !word.is_empty())
}

/// Parses a number, also in Fortran's form `1d-3`.
fn any_number(text: &str) -> Option<f64> {
    text.parse().or_else(|_| text.replace(['d', 'D'], "e").parse()).ok()
}

/// Parses a finite number, also in Fortran's form `1d-3`.
pub(super) fn number(name: &str, text: &str) -> Result<f64, String> {
    match any_number(text) {
        Some(x) if x.is_finite() => Ok(x),
        _ => Err(format!("`{name}` is `{text}`, no finite number")),
    }
}

/// Whether all words are numbers, finite or not. Fortran writes stars for a number that is too long for its field.
pub(super) fn is_numeric(text: &str) -> bool {
    words(text).all(|word| any_number(word).is_some() || word.chars().all(|c| c == '*'))
}

/// Whether all words are numbers and one of them is not finite, as programs write where a computation did not converge.
pub(super) fn is_unfit(text: &str) -> bool {
    is_numeric(text) && words(text).any(|word| any_number(word).is_none_or(|x| !x.is_finite()))
}

/// Parses one number, which may be in ASE's form for other values, `_JSON 1.5`.
pub(super) fn scalar(name: &str, text: &str) -> Result<f64, String> {
    let mut all = words(text);
    match (all.next(), all.next()) {
        (Some(one), None) => number(name, one),
        _ => Err(format!("`{name}` is `{text}`, no finite number")),
    }
}

/// Parses a list of numbers.
pub(super) fn numbers(name: &str, text: &str) -> Result<Vec<f64>, String> {
    words(text).map(|word| number(name, word)).collect()
}

/// Parses one flag for all three axes, or one for each.
pub(super) fn flags(name: &str, text: &str) -> Result<[bool; 3], String> {
    let one = |word: &str| match word {
        "T" | "True" | "true" | "TRUE" | "1" => Some(true),
        "F" | "False" | "false" | "FALSE" | "0" => Some(false),
        _ => None,
    };
    let all: Option<Vec<bool>> = words(text).map(one).collect();
    match all.as_deref() {
        Some(&[all]) => Ok([all; 3]),
        Some(&[a, b, c]) => Ok([a, b, c]),
        _ => Err(format!("`{name}` is `{text}`; use three of T and F")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Vec<(String, Option<String>)> {
        let all = pairs(line).expect(line).into_iter();
        all.map(|(key, value)| (key, value.map(|value| value.text))).collect()
    }

    fn of(all: &[(&str, Option<&str>)]) -> Vec<(String, Option<String>)> {
        all.iter().map(|(k, v)| (k.to_string(), v.map(str::to_string))).collect()
    }

    #[test]
    fn pairs_are_those_of_ase() {
        type Pairs<'a> = &'a [(&'a str, Option<&'a str>)];
        let cases: &[(&str, Pairs)] = &[
            ("a=1 b", &[("a", Some("1")), ("b", None)]),
            ("E = -3.1 eV", &[("E", Some("-3.1")), ("eV", None)]),
            ("x = y = z", &[("x", Some("y=z"))]),
            ("path=a=b c", &[("path", Some("a=b")), ("c", None)]),
            (r#"a="1 2"3 b=x'y z'{1 2}"#, &[("a", Some("1 23")), ("b", Some("xy z1 2"))]),
            (
                r#"a='1 2' b="say \"hi\"" "two words"=3"#,
                &[("a", Some("1 2")), ("b", Some("say \"hi\"")), ("two words", Some("3"))],
            ),
            (
                "a={1 2} b=[1, 2] c=[[1,2],[3,4]] d=",
                &[("a", Some("1 2")), ("b", Some("1, 2")), ("c", Some("[[1,2],[3,4]]")), ("d", Some(""))],
            ),
            ("it's Peter's 'own", &[("it's", None), ("Peter's", None), ("'own", None)]),
            ("", &[]),
        ];
        for (line, want) in cases {
            assert_eq!(read(line), of(want), "{line}");
        }
        for wrong in ["=5", "\"\"=5", "\"\"", "a=\"5", "a=[[1]", "a=5\" b=1"] {
            assert!(pairs(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        for (key, value) in [
            ("a", "1 2 3"),
            ("two words", "say \"hi\" and 'ho' \\ {"),
            ("it's", "[[1, 2], [3]]"),
            ("b", "[[1, 2"),
            ("c", "[[1], [2]]]"),
            ("é=", ""),
        ] {
            let line = format!("{} end=1", pair(key, value).expect("no line end"));
            assert_eq!(read(&line), of(&[(key, Some(value)), ("end", Some("1"))]), "{line}");
        }
        assert!(pair("", "1").is_err() && pair("a", "1\n2").is_err());
        assert_eq!([spelt("5"), spelt("T"), spelt("1 2"), spelt("1,2")], ["5", "T", "\"1 2\"", "\"1,2\""]);
    }

    #[test]
    fn spellings_read_back_or_are_not_used() {
        let line = r#"a=[1,2] b='x y' c="5" d=p q=1"2 3"4 e = y = z"#;
        let raws: Vec<&str> =
            pairs(line).expect(line).into_iter().map(|(_, value)| value.expect("a value").raw).collect();
        assert_eq!(raws, ["[1,2]", "'x y'", "\"5\"", "p", "1\"2 3\"4", "y = z"]);
        for (_, value) in pairs(line).expect(line) {
            let value = value.expect("a value");
            assert!(reads_as(value.raw, &value.text), "{value:?}");
        }
        for (raw, value) in [("", ""), ("a\\", "a"), ("[1,2]", "1, 2"), ("\"a\rb\"", "a\rb")] {
            assert!(!reads_as(raw, value), "{raw}");
        }
    }
}
