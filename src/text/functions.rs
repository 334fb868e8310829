//! What chat templates may call: functions and filters that transformers offers them.

use super::json;
use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

/// What a template said through `raise_exception`.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

pub(super) fn add(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(method);
    environment.add_function("raise_exception", raise);
    environment.add_function("strftime_now", now);
    environment.add_filter("tojson", tojson);
    // As in Python, none has no items, and whatever has a length and items is a sequence.
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("sequence", |value: &Value| {
        use ValueKind::{Map, Seq, String, Undefined};
        matches!(value.kind(), Map | Seq | String | Undefined)
    });
}

fn fault(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

fn raise(message: String) -> Result<Value, Error> {
    Err(fault("raised").with_source(Raised(message)))
}

/// Returns what the template said, if the error comes from `raise_exception`.
pub(super) fn raised(error: &Error) -> Option<&str> {
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        if let Some(Raised(message)) = inner.downcast_ref() {
            return Some(message);
        }
        cause = inner.source();
    }
    None
}

/// Python's methods. minijinja has most of them, and not those that are written here.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.as_str(), name) {
        (Some(text), "rsplit") => {
            let (at, most): (&str, Option<usize>) = from_args(args)?;
            let most = most.map_or(usize::MAX, |most| most.saturating_add(1));
            let mut parts: Vec<Value> = text.rsplitn(most, at).map(Value::from).collect();
            parts.reverse();
            Ok(Value::from(parts))
        }
        (Some(text), "removeprefix") => {
            let (part,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_prefix(part).unwrap_or(text)))
        }
        (Some(text), "removesuffix") => {
            let (part,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_suffix(part).unwrap_or(text)))
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

fn tojson(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    if options.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        return Err(fault("tojson writes characters as they are, so ensure_ascii cannot be true"));
    }
    options.assert_all_used()?;
    let separators = match separators.as_deref() {
        None if indent.is_some() => [",", ": "],
        None => [", ", ": "],
        Some([item, key]) => [&item[..], &key[..]],
        Some(_) => return Err(fault("tojson takes two separators")),
    };
    let text = json::written(value, indent, separators).map_err(|error| fault(error.to_string()))?;
    Ok(Value::from_safe_string(text))
}

fn now(format: &str) -> Result<String, Error> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    date(format, since.as_secs()).map_err(fault)
}

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

fn leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

/// The year, the month from 0 and the day of the month from 1 of a day after 1970-01-01, and the day of its year from 0.
fn calendar(mut day: u64) -> (u64, usize, u64, u64) {
    let mut year = 1970;
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let (mut rest, mut month) = (day, 0);
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    while rest >= lengths[month] {
        rest -= lengths[month];
        month += 1;
    }
    (year, month, rest + 1, day)
}

/// Writes a moment, in seconds after 1970 and in UTC, as Python's `strftime` does in English.
fn date(format: &str, seconds: u64) -> Result<String, String> {
    let (year, month, day, of_year) = calendar(seconds / 86400);
    let weekday = (seconds / 86400 + 4) % 7;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let (mut out, mut rest) = (String::new(), format.chars());
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let code = rest.next();
        let bare = code == Some('-');
        let code = if bare { rest.next() } else { code };
        let two = |n: u64| if bare { n.to_string() } else { format!("{n:02}") };
        out.push_str(&match code {
            Some('d') => two(day),
            Some('m') => two(month as u64 + 1),
            Some('y') => two(year % 100),
            Some('H') => two(hour),
            Some('I') => two((hour + 11) % 12 + 1),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('j') if bare => (of_year + 1).to_string(),
            Some('j') => format!("{:03}", of_year + 1),
            Some('Y') => year.to_string(),
            Some('B') => MONTHS[month].into(),
            Some('b') => MONTHS[month][..3].into(),
            Some('A') => DAYS[weekday as usize].into(),
            Some('a') => DAYS[weekday as usize][..3].into(),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('F') => format!("{year}-{:02}-{day:02}", month + 1),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('%') => "%".into(),
            Some(other) => return Err(format!("strftime_now does not know %{other}")),
            None => return Err("strftime_now was given a format that ends in %".into()),
        });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // From `date -u -d @SECONDS`.
        let says = |seconds: u64, text: &str| {
            assert_eq!(
                date("%a %d %b %Y %H:%M:%S, %-d %B, %j, %A, %y-%m, %F %T %I%p", seconds).as_deref(),
                Ok(text)
            );
        };
        says(0, "Thu 01 Jan 1970 00:00:00, 1 January, 001, Thursday, 70-01, 1970-01-01 00:00:00 12AM");
        says(
            951_827_696,
            "Tue 29 Feb 2000 12:34:56, 29 February, 060, Tuesday, 00-02, 2000-02-29 12:34:56 12PM",
        );
        says(
            1_798_761_599,
            "Thu 31 Dec 2026 23:59:59, 31 December, 365, Thursday, 26-12, 2026-12-31 23:59:59 11PM",
        );
        assert!(date("%", 0).is_err() && date("%Q", 0).is_err());
    }
}
