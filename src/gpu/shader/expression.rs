//! The `$` expressions of unrolled lines: names and integer arithmetic.

use super::is_word;
use std::collections::HashMap;

/// What a name in `${..}` or after `#unroll` can refer to.
#[derive(Default)]
pub(super) struct Scope {
    pub constants: HashMap<String, String>,
    pub variables: Vec<(String, u32)>,
}

impl Scope {
    pub fn variable(&self, name: &str) -> Option<u32> {
        self.variables.iter().find(|(n, _)| n == name).map(|(_, value)| *value)
    }

    /// Returns a line with its `$name`, `${expression}` and `$xyzw{expression}` replaced. A comment is left unchanged.
    pub fn substitute(&self, line: &str) -> Result<String, String> {
        let (mut rest, comment) = line.split_at(line.find("//").unwrap_or(line.len()));
        let mut out = String::with_capacity(line.len());
        while let Some(at) = rest.find('$') {
            out += &rest[..at];
            rest = &rest[at + 1..];
            let word = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
            let (name, tail) = rest.split_at(word);
            let Some(tail) = tail.strip_prefix('{').filter(|_| matches!(name, "" | "xyzw")) else {
                let value = self.evaluate(name);
                let hint = "where a letter, a digit or _ follows, write ${..}";
                out += &value.map_err(|e| format!("${name}: {e}; {hint}"))?.to_string();
                rest = tail;
                continue;
            };
            let (expression, tail) = tail.split_once('}').ok_or("'${' without '}'")?;
            let value = self.evaluate(expression)?;
            match name {
                "xyzw" => out.push(['x', 'y', 'z', 'w'][value as usize % 4]),
                _ => out += &value.to_string(),
            }
            rest = tail;
        }
        Ok(out + rest + comment)
    }

    pub fn evaluate(&self, expression: &str) -> Result<u32, String> {
        // A constant may be made of other constants. One that goes deeper than this is made of itself.
        let value = Expression { scope: self, rest: expression, depth: 8 }.whole();
        value.map_err(|e| format!("'{expression}': {e}"))
    }
}

/// `+ - * / %` and parentheses over u32, read by recursive descent.
struct Expression<'a> {
    scope: &'a Scope,
    rest: &'a str,
    depth: u32,
}

impl Expression<'_> {
    fn whole(mut self) -> Result<u32, String> {
        let value = self.sum()?;
        match self.rest.trim() {
            "" => Ok(value),
            rest => Err(format!("cannot read '{rest}'")),
        }
    }

    fn operator(&mut self, any_of: &str) -> Option<char> {
        let next = self.rest.trim_start();
        let operator = next.chars().next().filter(|c| any_of.contains(*c))?;
        self.rest = &next[1..];
        Some(operator)
    }

    fn sum(&mut self) -> Result<u32, String> {
        let mut a = self.product()?;
        while let Some(operator) = self.operator("+-") {
            let b = self.product()?;
            let value = if operator == '+' { a.checked_add(b) } else { a.checked_sub(b) };
            a = value.ok_or_else(|| format!("{a} {operator} {b} is no u32"))?;
        }
        Ok(a)
    }

    fn product(&mut self) -> Result<u32, String> {
        let mut a = self.atom()?;
        while let Some(operator) = self.operator("*/%") {
            let b = self.atom()?;
            let value = match operator {
                '*' => a.checked_mul(b),
                '/' => a.checked_div(b),
                _ => a.checked_rem(b),
            };
            a = value.ok_or_else(|| format!("{a} {operator} {b} is no u32"))?;
        }
        Ok(a)
    }

    fn atom(&mut self) -> Result<u32, String> {
        if self.operator("(").is_some() {
            let value = self.sum()?;
            return self.operator(")").map(|_| value).ok_or_else(|| "a parenthesis stays open".into());
        }
        let next = self.rest.trim_start();
        let end = next.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(next.len());
        let (word, rest) = next.split_at(end);
        self.rest = rest;
        if !is_word(word) {
            let digits = word.strip_suffix(['u', 'i']).unwrap_or(word);
            return digits.parse().map_err(|_| format!("a number or a name is missing at '{next}'"));
        }
        if let Some(value) = self.scope.variable(word) {
            return Ok(value);
        }
        let Some(text) = self.scope.constants.get(word) else {
            return Err(format!("no unroll variable and no integer constant is called '{word}'"));
        };
        let depth = self.depth.checked_sub(1).ok_or("constants are made of each other too deeply")?;
        let value = Expression { scope: self.scope, rest: text, depth }.whole();
        value.map_err(|e| format!("{word} = '{text}': {e}"))
    }
}
