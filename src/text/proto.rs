//! Reads `tokenizer.model`, the file of sentencepiece. It is a message of protocol buffers, of which a few fields are needed
//! (<https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto>).

use super::pieces::{Kind, Piece};

/// What a `tokenizer.model` says.
#[derive(Debug)]
pub(super) struct Model {
    pub pieces: Vec<Piece>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    /// Whether a text begins with a blank that is not the user's.
    pub prefix: bool,
}

/// The value of a field.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Float(f32),
    /// Eight bytes, which no field that is read here has.
    Long,
}

impl Field<'_> {
    fn flag(&self) -> bool {
        matches!(self, Field::Number(n) if *n != 0)
    }

    /// A number that is an id, unless it is negative.
    fn id(&self) -> Option<u32> {
        if let Field::Number(n) = self { u32::try_from(*n).ok() } else { None }
    }
}

/// Splits a number of seven bits a byte off the front, lowest bits first.
fn number(data: &mut &[u8]) -> Result<u64, String> {
    let mut all = 0u64;
    for place in 0..10 {
        let (byte, rest) = data.split_first().ok_or("it is cut short")?;
        *data = rest;
        all |= u64::from(byte & 127) << (7 * place);
        if byte & 128 == 0 {
            return Ok(all);
        }
    }
    Err("a number in it is too long".into())
}

fn take<'a>(data: &mut &'a [u8], count: u64) -> Result<&'a [u8], String> {
    let count = usize::try_from(count).ok().filter(|count| *count <= data.len()).ok_or("it is cut short")?;
    let (taken, rest) = data.split_at(count);
    *data = rest;
    Ok(taken)
}

/// Calls `each` with the number and value of every field of a message.
fn fields<'a>(
    mut data: &'a [u8],
    mut each: impl FnMut(u64, Field<'a>) -> Result<(), String>,
) -> Result<(), String> {
    while !data.is_empty() {
        let key = number(&mut data)?;
        let value = match key & 7 {
            0 => Field::Number(number(&mut data)?),
            1 => take(&mut data, 8).map(|_| Field::Long)?,
            2 => {
                let length = number(&mut data)?;
                Field::Bytes(take(&mut data, length)?)
            }
            5 => Field::Float(take(&mut data, 4)?.try_into().map(f32::from_le_bytes).unwrap_or_default()),
            other => return Err(format!("it has a field of the unknown form {other}")),
        };
        each(key >> 3, value)?;
    }
    Ok(())
}

fn piece(data: &[u8]) -> Result<Piece, String> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: Kind::Normal };
    fields(data, |field, value| {
        match (field, value) {
            (1, Field::Bytes(text)) => {
                piece.text = String::from_utf8(text.to_vec()).map_err(|_| "a piece is not UTF-8")?;
            }
            (2, Field::Float(score)) => piece.score = score,
            (3, Field::Number(kind)) => piece.kind = Kind::of(kind.into())?,
            _ => {}
        }
        Ok(())
    })?;
    Ok(piece)
}

/// Reads how the pieces were trained, of which the kind of model and the ids of control tokens are needed.
fn training(data: &[u8], model: &mut Model, kind: &mut u64) -> Result<(), String> {
    fields(data, |field, value| {
        match (field, value) {
            (3, Field::Number(number)) => *kind = number,
            (24, value) if value.flag() => {
                return Err("its blanks stand behind words, which is not read".into());
            }
            (41, value) => model.bos = value.id(),
            (42, value) => model.eos = value.id(),
            _ => {}
        }
        Ok(())
    })
}

/// Reads how text is prepared. What is not known here is refused, because it would change tokens.
fn preparation(data: &[u8], model: &mut Model, squeezes: &mut bool) -> Result<(), String> {
    let (mut name, mut maps, mut escapes) = (String::new(), false, true);
    fields(data, |field, value| {
        match (field, value) {
            (1, Field::Bytes(text)) => name = String::from_utf8_lossy(text).into_owned(),
            (2, Field::Bytes(map)) => maps = !map.is_empty(),
            (3, value) => model.prefix = value.flag(),
            (4, value) => *squeezes = value.flag(),
            (5, value) => escapes = value.flag(),
            _ => {}
        }
        Ok(())
    })?;
    if maps {
        return Err(format!("it normalises text by '{name}'; only 'identity' is read"));
    }
    if escapes { Ok(()) } else { Err("its blanks are not escaped, which is not read".into()) }
}

/// Reads the file. Models other than BPE are refused by name.
pub(super) fn parse(data: &[u8]) -> Result<Model, String> {
    // The format's values for fields that are left out: a unigram model, ids 1 and 2, blanks squeezed.
    let mut model = Model { pieces: Vec::new(), bos: Some(1), eos: Some(2), prefix: true };
    let (mut kind, mut squeezes) = (1, true);
    fields(data, |field, value| match (field, value) {
        (1, Field::Bytes(data)) => piece(data).map(|piece| model.pieces.push(piece)),
        (2, Field::Bytes(data)) => training(data, &mut model, &mut kind),
        (3, Field::Bytes(data)) => preparation(data, &mut model, &mut squeezes),
        _ => Ok(()),
    })
    .map_err(|error| format!("this is no file of sentencepiece that can be read: {error}"))?;
    if model.pieces.is_empty() {
        return Err("this is no file of sentencepiece: it has no pieces".into());
    }
    if kind != 2 {
        let names = [(1, "unigram"), (3, "word"), (4, "char")];
        let name = names.iter().find(|(number, _)| *number == kind).map_or("unknown", |(_, name)| name);
        return Err(format!("it is a {name} model of sentencepiece; only its BPE models are read"));
    }
    if squeezes {
        return Err("it removes blanks that follow each other, which is not read".into());
    }
    Ok(model)
}
