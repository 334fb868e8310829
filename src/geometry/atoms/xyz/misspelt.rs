//! Keys that are nearly `Lattice`, `pbc` or `Properties`. A frame without these means something else, so what may stand for one of them is
//! read, refused, or said, and never passed over.

use super::labels::Labels;
use super::pairs::{flags, numbers};
use std::collections::BTreeMap;

/// The keys whose near misses must not be passed over.
pub(super) const FIXED: [&str; 3] = ["Lattice", "pbc", "Properties"];

/// Names that other formats have for the cell.
const CELLS: [&str; 7] =
    ["cell", "unit_cell", "unitcell", "cell_vectors", "lattice_vectors", "box", "simulation_cell"];
/// Names that other formats have for the periodic axes.
const PERIODS: [&str; 7] = [
    "periodic",
    "periodicity",
    "boundary",
    "boundaries",
    "boundary_conditions",
    "periodic_boundary_conditions",
    "periods",
];

/// Gives keys that differ from known ones by capital letters their names, and refuses those that differ by a letter or two.
pub(super) fn corrected(
    keys: &mut BTreeMap<String, String>,
    at: usize,
    labels: &mut Labels,
) -> Result<(), String> {
    let all: Vec<String> = keys.keys().filter(|key| !FIXED.contains(&key.as_str())).cloned().collect();
    for key in &all {
        if let Some(known) = FIXED.into_iter().find(|known| known.eq_ignore_ascii_case(key)) {
            if keys.contains_key(known) {
                return Err(format!("both `{known}` and `{key}` are given; take one of them out"));
            }
            labels.note(&format!("case {key}"), || {
                format!("line {at}: the key `{key}` was read as `{known}`, which ASE does not")
            });
            let value = keys.remove(key).unwrap_or_default();
            keys.insert(known.into(), value);
        }
    }
    for key in all {
        let Some(value) = keys.get(&key) else { continue };
        if let Some(known) = meant(&key, value).filter(|known| *known != "pbc" || !keys.contains_key("pbc")) {
            return Err(format!("the key `{key}` is nearly `{known}`; correct it, or give it another name"));
        }
    }
    let is_cell = |(key, value): &(&String, &String)| {
        let lower = key.to_lowercase();
        let count = numbers(key, value).map_or(0, |all| all.len());
        CELLS.contains(&lower.as_str()) && [3, 6, 9].contains(&count)
    };
    if let Some((key, _)) = keys.iter().find(is_cell).filter(|_| !keys.contains_key("Lattice")) {
        let text = || format!("line {at}: `{key}` was not read as the cell, whose key is `Lattice`");
        labels.note(&format!("cell {key}"), text);
    }
    let is_periods = |(key, value): &(&String, &String)| {
        let lower = key.to_lowercase();
        lower != "pbc" && lower.contains("pbc") && flags(key, value).is_ok()
    };
    if let Some((key, _)) = keys.iter().find(is_periods).filter(|_| !keys.contains_key("pbc")) {
        let text = || format!("line {at}: `{key}` was not read as the periodic axes, whose key is `pbc`");
        labels.note(&format!("periods {key}"), text);
    }
    Ok(())
}

/// The known key that was probably meant by another. What the value is decides where the names alone do not.
fn meant(key: &str, value: &str) -> Option<&'static str> {
    let lower = key.to_lowercase();
    let nine = || numbers(key, value).is_ok_and(|all| all.len() == 9);
    let lattice = distance(&lower, "lattice");
    if lattice <= 1 || (lattice == 2 || lower.starts_with("lat")) && nine() {
        return Some("Lattice");
    }
    let properties = distance(&lower, "properties");
    if properties <= 1 || properties <= 3 && value.contains(":pos:") {
        return Some("Properties");
    }
    let three = || flags(key, value).is_ok() && value.trim().len() > 1;
    // Other keys of three letters, such as `pbe`, are near too, so three flags must follow.
    let swapped =
        lower.len() == 3 && distance(&lower, "pbc") == 1 && "pbc".chars().all(|c| lower.contains(c));
    let like = PERIODS.contains(&lower.as_str()) || swapped;
    (like && flags(key, value).is_ok() || distance(&lower, "pbc") <= 1 && three()).then_some("pbc")
}

/// An error if a word that stands alone is a known key, as in `Lattice: "8 0 0 0 8 0 0 0 8"`. In a plain comment a word may be
/// one by chance, so there nine numbers must follow.
pub(super) fn alone(words: &[String], is_plain: bool) -> Result<(), String> {
    for (i, word) in words.iter().enumerate() {
        let bare = word.trim_end_matches(':');
        let lower = bare.to_lowercase();
        // A key is written `Lattice`, and a plain word in a sentence may be near it.
        let Some(known) = FIXED.into_iter().chain(["energy", "stress"]).find(|known| {
            known.to_lowercase() == lower || known.len() > 6 && distance(&lower, &known.to_lowercase()) <= 1
        }) else {
            continue;
        };
        let after = &words[i + 1..];
        let one = |word: &String| numbers(known, word).unwrap_or_default().len();
        let nine: usize = after.iter().map(one).take_while(|&count| count > 0).sum();
        if !is_plain || known == "Lattice" && nine == 9 {
            return Err(format!("`{word}` has no value; write `{known}=`"));
        }
    }
    Ok(())
}

/// The least number of letters more, less, other, or of neighbours that changed places, by which two words differ.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    // Long words are far, and their table would be large.
    if a.len().abs_diff(b.len()) > 3 {
        return usize::MAX;
    }
    let mut table = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            table[i][j] = match (i, j) {
                (0, n) | (n, 0) => n,
                _ => {
                    let other = table[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
                    let mut least = other.min(table[i - 1][j] + 1).min(table[i][j - 1] + 1);
                    if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                        least = least.min(table[i - 2][j - 2] + 1);
                    }
                    least
                }
            };
        }
    }
    table[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_are_near() {
        for (a, b, want) in [
            ("pcb", "pbc", 1),
            ("latice", "lattice", 1),
            ("lattices", "lattice", 1),
            ("", "abc", 3),
            ("abc", "cba", 2),
        ] {
            assert_eq!(distance(a, b), want, "{a} {b}");
        }
        assert_eq!(distance("lat", "properties"), usize::MAX);
        for (key, value, want) in [
            ("pcb", "T T F", Some("pbc")),
            ("pcb", "T", Some("pbc")),
            ("pbe", "T", None),
            ("pbe", "-1.5", None),
            ("periodic", "T T F", Some("pbc")),
            ("periodic", "yes", None),
            ("Lat", "8 0 0 0 8 0 0 0 8", Some("Lattice")),
            ("lattice_constant", "3.6", None),
            ("Propertys", "species:S:1:pos:R:3", Some("Properties")),
            ("property", "hardness", None),
        ] {
            assert_eq!(meant(key, value), want, "{key}");
        }
    }
}
