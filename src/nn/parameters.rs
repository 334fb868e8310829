//! The parameters and buffers of a module, as its walk lists them.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

/// What makes two handles the same parameter: the leaf, or else the elements.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    leaf: Option<u64>,
    value: usize,
    offset: usize,
    shape: crate::shape::Shape,
    strides: crate::shape::Strides,
}

impl Identity {
    pub fn of(x: &Tensor) -> Identity {
        let value = Arc::as_ptr(&x.value) as usize;
        Identity { leaf: x.leaf_id(), value, offset: x.offset, shape: x.shape, strides: x.strides }
    }
}

/// What a tensor of a module is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Parameter,
    /// Saved, and not trained.
    Buffer,
    /// Neither saved nor trained, as the settings determine it.
    Constant,
}

/// A tensor of a module.
#[derive(Clone)]
pub(super) struct Item {
    /// All of its names, in the order of the walk.
    pub names: Vec<String>,
    pub tensor: Tensor,
    pub role: Role,
}

/// The parameters and buffers of a module, each once, and the number of weight elements that its sites use.
///
/// ```
/// # use std::sync::Arc;
/// # use tiebeam::nn::{Linear, Module};
/// # use tiebeam::{Gpu, Tensor, module};
/// # let gpu = Gpu::open()?;
/// struct Twice(Vec<Linear>);
/// module!(Twice { 0 => "layers" });
///
/// let theta = Tensor::ones(&gpu, [4, 4]).requires_grad();
/// let all = Twice(vec![Linear::tied(&theta), Linear::tied(&theta)]).parameters();
/// assert_eq!((all.named().len(), all.stored(), all.used()), (1, 16, 32));
/// assert_eq!(all.names(&theta), ["layers.0.weight", "layers.1.weight"]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Default)]
pub struct Parameters {
    pub(super) items: Vec<Item>,
    pub(super) known: HashMap<Identity, usize>,
    /// The parameters with their first names, as they are handed out.
    pub(super) named: Vec<(String, Tensor)>,
    pub(super) used: usize,
    /// Tensors that are computed from leaves, with their names. They are not listed.
    pub(super) computed: Vec<(String, Tensor)>,
}

impl Parameters {
    pub(super) fn list(&mut self, name: String, tensor: &Tensor, role: Role) {
        // A tensor that is computed from leaves is no parameter. Its leaves are.
        if tensor.is_tracked() && !tensor.is_leaf() {
            self.computed.push((name, tensor.clone()));
            return;
        }
        match self.known.get(&Identity::of(tensor)) {
            Some(&at) if self.items[at].names.contains(&name) => {}
            Some(&at) => self.items[at].names.push(name),
            None => {
                self.known.insert(Identity::of(tensor), self.items.len());
                if role == Role::Parameter {
                    self.named.push((name.clone(), tensor.clone()));
                }
                self.items.push(Item { names: vec![name], tensor: tensor.clone(), role });
            }
        }
    }

    /// Names and parameters, frozen ones too, in the order of the walk. One with several names is listed under the first.
    pub fn named(&self) -> &[(String, Tensor)] {
        &self.named
    }

    /// Those that are trained: what an optimizer gets.
    pub fn trainable(&self) -> Vec<(String, Tensor)> {
        self.named.iter().filter(|(_, x)| x.is_leaf()).cloned().collect()
    }

    /// Names and buffers, in the order of the walk.
    pub fn buffers(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        let buffers = self.items.iter().filter(|item| item.role == Role::Buffer);
        buffers.map(|item| (&*item.names[0], &item.tensor))
    }

    /// Parameters and buffers with all of their names: what a file holds.
    pub fn all(&self) -> impl Iterator<Item = (&[String], &Tensor)> {
        let kept = self.items.iter().filter(|item| item.role != Role::Constant);
        kept.map(|item| (&item.names[..], &item.tensor))
    }

    /// Parameters and buffers, each under its first name: what a checkpoint holds, as PyTorch's `state_dict`.
    pub fn state_dict(&self) -> Vec<(String, Tensor)> {
        self.all().map(|(names, tensor)| (names[0].clone(), tensor.clone())).collect()
    }

    /// Refuses what a file would lose: what is computed from a leaf, unless it is a view of one that is listed, and a view of part
    /// of another tensor, which cannot be read back.
    pub(crate) fn check_saved(&self) -> Result<()> {
        let listed = |x: &Tensor| self.items.iter().any(|item| Arc::ptr_eq(&item.tensor.value, &x.value));
        if let Some((name, _)) = self.computed.iter().find(|(_, x)| !listed(x)) {
            let message = format!(
                "`{name}` is computed from a leaf, and would not be saved; keep the leaf, and compute it in forward"
            );
            return Err(Error::config(message));
        }
        match self.all().find(|(_, x)| !x.is_whole()) {
            Some((names, _)) => Err(Error::config(format!(
                "`{}` is a view of another tensor, into which no file can be loaded; give it elements of its own with copy()",
                names[0]
            ))),
            None => Ok(()),
        }
    }

    /// All names of a parameter or buffer. More than one means that it is tied.
    pub fn names(&self, tensor: &Tensor) -> &[String] {
        self.known.get(&Identity::of(tensor)).map_or(&[], |&at| &self.items[at].names)
    }

    /// Number of elements stored in parameters: each once.
    pub fn stored(&self) -> usize {
        self.named.iter().map(|(_, tensor)| tensor.count()).sum()
    }

    /// Number of elements used: every site's weight, however it is stored, and every other parameter, each time that it is
    /// listed. What a loop calls several times is listed once: list a clone for each depth to count it, as in
    /// [`Linear::tied`](super::Linear::tied).
    pub fn used(&self) -> usize {
        self.used
    }
}

/// A line for each parameter and buffer: its name, its shape, and whether it is a buffer, frozen, or has other names. The last line has
/// the numbers of elements that are stored and used.
///
/// ```
/// # use tiebeam::nn::{Linear, Module, module};
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// struct Twice {
///     layers: Vec<Linear>,
/// }
/// module!(Twice { layers });
///
/// let layer = Linear::tied(&Tensor::ones(&gpu, [4, 4]).requires_grad());
/// let text = Twice { layers: vec![layer; 2] }.parameters().to_string();
/// assert_eq!(text, "layers.0.weight  [4, 4]  also layers.1.weight\n16 stored, 32 used");
/// # Ok::<(), tiebeam::Error>(())
/// ```
impl fmt::Display for Parameters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows: Vec<[String; 3]> =
            self.items.iter().filter(|item| item.role != Role::Constant).map(Item::row).collect();
        let width = |at: usize| rows.iter().map(|row| row[at].len()).max().unwrap_or(0);
        let [name, shape] = [width(0), width(1)];
        for [first, of, rest] in &rows {
            writeln!(f, "{}", format!("{first:name$}  {of:shape$}  {rest}").trim_end())?;
        }
        write!(f, "{} stored, {} used", self.stored(), self.used())
    }
}

impl Item {
    /// Its name, its shape, and the rest that is to be told.
    fn row(&self) -> [String; 3] {
        let mut rest = Vec::new();
        if self.tensor.dtype() != DType::F32 {
            rest.push(self.tensor.dtype().to_string());
        }
        match self.role {
            Role::Buffer => rest.push("buffer".into()),
            _ if !self.tensor.is_leaf() => rest.push("frozen".into()),
            _ => {}
        }
        match &self.names[1..] {
            [] => {}
            [name] => rest.push(format!("also {name}")),
            [name, others @ ..] => rest.push(format!("also {name} and {} more", others.len())),
        }
        [self.names[0].clone(), self.tensor.shape().to_string(), rest.join(", ")]
    }
}
