//! Modules: what holds parameters and buffers, and the walk over them that lists, saves, loads, freezes, casts and moves.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::ops::product::site::Site;
use crate::tensor::Tensor;
use std::collections::HashMap;
use std::ops::Deref;
use std::sync::Arc;

/// Something with parameters.
///
/// A module is a struct with a `forward` of its own, whose fields are modules too: tensors, weights (`Arc<dyn Site>`), layers,
/// [`Buffer`]s, and options and lists of these. [`module!`](crate::module) lists the fields, and nothing more is to be written:
///
/// ```
/// use tiebeam::nn::{Init, Linear, Module};
/// use tiebeam::{Gpu, Rng, Tensor, module};
///
/// struct Gated {
///     layer: Linear,
///     gate: Tensor,
///     width: usize,
/// }
///
/// module!(Gated { layer, gate, width: _ });
///
/// impl Gated {
///     fn forward(&self, x: &Tensor) -> Tensor {
///         self.layer.forward(x).mul(&self.gate)
///     }
/// }
///
/// let gpu = Gpu::open()?;
/// let layer = Linear::new(&gpu, 3, 2, true, Init::KaimingUniform, &mut Rng::new(1));
/// let mut net = Gated { layer, gate: Tensor::ones(&gpu, [2]).requires_grad(), width: 2 };
/// let names: Vec<String> = net.parameters().named().iter().map(|(name, _)| name.clone()).collect();
/// assert_eq!(names, ["layer.weight", "layer.bias", "gate"]);
/// // Frozen, they are parameters still.
/// net.freeze(|name| name.starts_with("layer."));
/// assert_eq!((net.parameters().named().len(), net.parameters().trainable().len()), (3, 1));
/// # Ok::<(), tiebeam::Error>(())
/// ```
///
/// `save` and `load` are those of [`ModuleFile`](super::ModuleFile), which every module has.
pub trait Module {
    /// Shows every field to `visit`, under its name.
    fn visit(&self, visit: &mut Visit);

    /// The same fields, to replace their tensors.
    fn visit_mut(&mut self, visit: &mut VisitMut);

    /// Every parameter and buffer, each once, with all of its names.
    fn parameters(&self) -> Parameters {
        let mut all = Parameters::default();
        self.visit(&mut Visit { path: String::new(), all: &mut all });
        all
    }

    /// Replaces every parameter and buffer by what `change` makes of its first name and itself. A tensor with several names is
    /// changed once, so what was tied stays tied, and keeps its shape. Two handles on the same elements, one of them detached,
    /// are two tensors here.
    ///
    /// Optimizers go on to train the old leaves: make them after this.
    ///
    /// # Errors
    /// The first error of `change`; [`Error::Config`] when a shape changes or floats become integers, or when the module holds a
    /// tensor that is computed from a leaf, such as a transposed view, which would go on to read the old one. The module is then
    /// unchanged.
    fn map(&mut self, mut change: impl FnMut(&str, &Tensor) -> Result<Tensor>) -> Result<()>
    where
        Self: Sized,
    {
        replace(self, &mut |item| match item.role {
            Role::Constant => Ok(item.tensor.clone()),
            _ => change(&item.names[0], &item.tensor),
        })
    }

    /// Takes the parameters with a name that is `chosen` out of training. They are saved and moved as before. Make optimizers after
    /// this, and drop those that were made before, which hold the old leaves: they find no gradient for them, and none after
    /// [`Module::unfreeze`] either, which makes new leaves.
    ///
    /// # Panics
    /// When the module holds a tensor that is computed from a leaf.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::Rng;
    /// use tiebeam::nn::{Init, Linear, Module};
    /// let mut layer = Linear::new(&gpu, 3, 2, true, Init::XavierUniform, &mut Rng::new(1));
    /// layer.freeze(|name| name == "weight");
    /// assert_eq!(layer.parameters().trainable()[0].0, "bias");
    /// assert_eq!(layer.parameters().named().len(), 2); // both are saved
    /// // Fine-tuning: drop(optimizer); optimizer = AdamW::new(&gpu, vec![Group::new(layer.parameters().trainable())], ..)?;
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    fn freeze(&mut self, chosen: impl Fn(&str) -> bool)
    where
        Self: Sized,
    {
        done(replace(self, &mut |item| {
            let frozen = item.tensor.is_leaf() && item.names.iter().any(|name| chosen(name));
            Ok(if frozen { item.tensor.detach() } else { item.tensor.clone() })
        }));
    }

    /// Makes new leaves of the parameters of floats with a name that is `chosen`. Make optimizers after this.
    ///
    /// # Panics
    /// As [`Module::freeze`].
    #[track_caller]
    fn unfreeze(&mut self, chosen: impl Fn(&str) -> bool)
    where
        Self: Sized,
    {
        done(replace(self, &mut |item| {
            let trained = item.role == Role::Parameter && item.tensor.dtype().is_float();
            let trained = trained && item.names.iter().any(|name| chosen(name));
            Ok(if trained { item.tensor.requires_grad() } else { item.tensor.clone() })
        }));
    }

    /// Converts every parameter of floats to this type, with the leaves staying leaves. Buffers, such as running statistics, stay
    /// as they are. Optimizers take f32 only; types of 16 bits halve the memory of a model that is not trained.
    ///
    /// # Panics
    /// When the type has no floats, or the module holds a tensor that is computed from a leaf.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::{DType, Rng};
    /// use tiebeam::nn::{Init, Linear, Module};
    /// let mut layer = Linear::new(&gpu, 3, 2, true, Init::XavierUniform, &mut Rng::new(1));
    /// layer.cast(DType::Bf16);
    /// assert!(layer.parameters().named().iter().all(|(_, p)| p.dtype() == DType::Bf16));
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    fn cast(&mut self, dtype: DType)
    where
        Self: Sized,
    {
        assert!(dtype.is_float(), "cast: parameters have floats, and {dtype} does not");
        done(replace(self, &mut |item| {
            let x = &item.tensor;
            if item.role != Role::Parameter || !x.dtype().is_float() {
                return Ok(x.clone());
            }
            let y = x.detach().cast(dtype);
            Ok(if x.is_leaf() { y.requires_grad() } else { y })
        }));
    }

    /// Copies every tensor to another device, by way of the host. Leaves stay leaves.
    ///
    /// # Errors
    /// When a tensor carries an error, or a device has failed, and as [`Module::map`]. The module is then unchanged.
    fn to(&mut self, gpu: &Gpu) -> Result<()>
    where
        Self: Sized,
    {
        replace(self, &mut |Item { tensor: x, .. }| {
            let y = x.to_gpu(gpu)?;
            Ok(if x.is_leaf() { y.requires_grad() } else { y })
        })
    }
}

/// Replaces every tensor of a module by what `change` makes of it. Everything is made and checked before anything is replaced.
fn replace(module: &mut dyn Module, change: &mut dyn FnMut(&Item) -> Result<Tensor>) -> Result<()> {
    let all = module.parameters();
    if let Some(name) = all.computed.first() {
        let message = format!(
            "`{name}` is computed from a leaf, as by t(), and would go on to read the old one; compute it in forward instead"
        );
        return Err(Error::config(message));
    }
    let mut made = HashMap::new();
    for item in all.items {
        let new = change(&item)?;
        let (old, name) = (&item.tensor, &item.names[0]);
        if new.shape() != old.shape() || new.dtype().is_float() != old.dtype().is_float() {
            let (shape, dtype) = (new.shape(), new.dtype());
            let message =
                format!("`{name}` is {} {} and cannot become {dtype} {shape}", old.dtype(), old.shape());
            return Err(Error::config(message));
        }
        made.insert(Identity::of(old), (old.clone(), new));
    }
    module.visit_mut(&mut VisitMut { made: &made });
    Ok(())
}

#[track_caller]
fn done(changed: Result<()>) {
    if let Err(error) = changed {
        panic!("{error}");
    }
}

/// Lists the fields of a module, each under its own name: `module!(Net { up, down })`. A field `name => "other"` is listed under
/// another name, and `name => ""` without one, so that its parts stand beside the other fields. Type parameters are written in
/// brackets: `module!([T: Module] Pair<T> { left, right })`.
///
/// A field without tensors is written as in a pattern that skips it: `module!(Net { up, down, depth: _ })`. Every field is listed in
/// one way or the other, so that one which is forgotten is an error of the compiler, and not a weight that is neither trained nor
/// saved:
///
/// ```compile_fail,E0063
/// use tiebeam::nn::{Linear, module};
/// struct Net {
///     up: Linear,
///     down: Linear,
/// }
/// module!(Net { up }); // error: missing field `down`
/// ```
///
/// [`nn::check_listed`](crate::nn::check_listed) finds what a wrong `_` hides.
#[macro_export]
macro_rules! module {
    ([$($generic:tt)*] $ty:ty { $($field:tt $(=> $name:literal)? $(: $skipped:tt)?),* $(,)? }) => {
        impl<$($generic)*> $crate::nn::Module for $ty {
            fn visit(&self, visit: &mut $crate::nn::Visit) {
                // It is never called. It compiles only if all fields are listed.
                #[allow(unreachable_code, clippy::diverging_sub_expression)]
                let _ = || Self { $($field: ::std::unreachable!()),* };
                $( $crate::module!(@visit visit, &self.$field, $field, ($($name)?) ($($skipped)?)); )*
            }
            fn visit_mut(&mut self, visit: &mut $crate::nn::VisitMut) {
                $( $crate::module!(@replace visit, &mut self.$field, ($($skipped)?)); )*
            }
        }
    };
    (@visit $visit:ident, $module:expr, $field:tt, () ()) => { $visit.field(stringify!($field), $module) };
    (@visit $visit:ident, $module:expr, $field:tt, ($name:literal) ()) => { $visit.field($name, $module) };
    (@visit $visit:ident, $module:expr, $field:tt, () (_)) => {};
    (@replace $visit:ident, $module:expr, ()) => { $visit.field($module) };
    (@replace $visit:ident, $module:expr, (_)) => {};
    ($ty:ty { $($fields:tt)* }) => { $crate::module!([] $ty { $($fields)* }); };
}

/// A tensor that belongs to a module and is not trained, such as a running mean. It is saved, loaded and moved with the
/// parameters.
#[derive(Clone, Debug)]
pub struct Buffer(pub Tensor);

impl Deref for Buffer {
    type Target = Tensor;
    fn deref(&self) -> &Tensor {
        &self.0
    }
}

/// The walk over a module that lists what it holds.
pub struct Visit<'a> {
    path: String,
    all: &'a mut Parameters,
}

impl Visit<'_> {
    /// Goes into a field. Without a name, its parts stand at this place.
    pub fn field(&mut self, name: &str, module: &(impl Module + ?Sized)) {
        let end = self.path.len();
        self.path = join(&self.path, name);
        module.visit(self);
        self.path.truncate(end);
    }

    /// Lists a tensor as a parameter of which sites make weights. It counts as stored but not as used.
    pub fn store(&mut self, name: &str, tensor: &Tensor) {
        self.all.list(join(&self.path, name), tensor, Role::Parameter);
    }

    /// Lists a tensor that follows from the settings, such as a table of angles. It moves with the module, and no file has it.
    pub fn constant(&mut self, name: &str, tensor: &Tensor) {
        self.all.list(join(&self.path, name), tensor, Role::Constant);
    }

    /// Lists the leaves and buffers of a weight. The elements of the matrix that it makes count as used.
    pub fn site(&mut self, site: &dyn Site) {
        let [out, inner] = site.size();
        self.all.used += out * inner;
        for (name, leaf) in site.leaf_names().iter().zip(site.leaves()) {
            self.all.list(join(&self.path, name), &leaf, Role::Parameter);
        }
        for (name, buffer) in site.buffers() {
            self.all.list(join(&self.path, name), &buffer, Role::Buffer);
        }
    }
}

/// The walk that replaces tensors. It visits the same fields as [`Visit`], in any order.
pub struct VisitMut<'a> {
    made: &'a HashMap<Identity, (Tensor, Tensor)>,
}

impl VisitMut<'_> {
    /// Goes into a field.
    pub fn field(&mut self, module: &mut (impl Module + ?Sized)) {
        module.visit_mut(self);
    }

    /// Replaces a tensor, if it is one that [`Visit`] has listed.
    pub fn tensor(&mut self, tensor: &mut Tensor) {
        if let Some((_, new)) = self.made.get(&Identity::of(tensor)) {
            *tensor = new.clone();
        }
    }
}

/// What makes two handles the same parameter: the leaf, or else the elements.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Identity {
    leaf: Option<u64>,
    value: usize,
    offset: usize,
    shape: crate::shape::Shape,
    strides: crate::shape::Strides,
}

impl Identity {
    fn of(x: &Tensor) -> Identity {
        let value = Arc::as_ptr(&x.value) as usize;
        Identity { leaf: x.leaf_id(), value, offset: x.offset, shape: x.shape, strides: x.strides }
    }
}

/// What a tensor of a module is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Parameter,
    /// Saved, and not trained.
    Buffer,
    /// Neither saved nor trained, as the settings determine it.
    Constant,
}

/// A tensor of a module.
#[derive(Clone)]
struct Item {
    /// All of its names, in the order of the walk.
    names: Vec<String>,
    tensor: Tensor,
    role: Role,
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
    items: Vec<Item>,
    known: HashMap<Identity, usize>,
    /// The parameters with their first names, as they are handed out.
    named: Vec<(String, Tensor)>,
    used: usize,
    /// Names of tensors that are computed from leaves, which are not listed.
    computed: Vec<String>,
}

impl Parameters {
    /// The parameters that `module` lists: [`Module::parameters`].
    pub fn of(module: &(impl Module + ?Sized)) -> Parameters {
        module.parameters()
    }

    /// The parameters of several modules under these names, for what is no struct of its own.
    pub fn of_fields(fields: &[(&str, &dyn Module)]) -> Parameters {
        let mut all = Parameters::default();
        let mut visit = Visit { path: String::new(), all: &mut all };
        fields.iter().for_each(|(name, module)| visit.field(name, *module));
        all
    }

    fn list(&mut self, name: String, tensor: &Tensor, role: Role) {
        // A tensor that is computed from leaves is no parameter. Its leaves are.
        if tensor.is_tracked() && !tensor.is_leaf() {
            self.computed.push(name);
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

/// `path.name`, or the one of the two that is not empty.
pub fn join(path: &str, name: &str) -> String {
    match (path, name) {
        ("", only) | (only, "") => only.to_string(),
        _ => format!("{path}.{name}"),
    }
}

/// Checks that a module lists every leaf from which `loss` was computed: one that is not listed would be neither trained nor saved.
///
/// # Errors
/// [`Error::Config`] with the shapes of the leaves that are missing; the device's fault.
///
/// # Panics
/// As [`Tensor::backward`], which this calls.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::Rng;
/// use tiebeam::nn::{Init, Linear, check_listed};
/// let layer = Linear::new(&gpu, 3, 2, true, Init::XavierUniform, &mut Rng::new(1));
/// let loss = layer.forward(&Tensor::ones(&gpu, [1, 3])).sum_all();
/// check_listed(&layer, &loss)?; // weight and bias are all that the loss depends on
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub fn check_listed(module: &(impl Module + ?Sized), loss: &Tensor) -> Result<()> {
    let (grads, all) = (loss.backward_retain_graph()?, module.parameters());
    let listed: Vec<u64> = all.named().iter().filter_map(|(_, x)| x.leaf_id()).collect();
    let missing: Vec<String> =
        grads.leaves().filter(|(id, _)| !listed.contains(id)).map(|(_, dx)| dx.shape().to_string()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let message = format!(
        "the module uses {} leaves that it does not list, of the shapes {}; list their fields in module!(..)",
        missing.len(),
        missing.join(", ")
    );
    Err(Error::config(message))
}

impl Module for Tensor {
    fn visit(&self, visit: &mut Visit) {
        visit.all.used += self.count();
        visit.all.list(visit.path.clone(), self, Role::Parameter);
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        visit.tensor(self);
    }
}

impl Module for Buffer {
    fn visit(&self, visit: &mut Visit) {
        visit.all.list(visit.path.clone(), &self.0, Role::Buffer);
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        visit.tensor(&mut self.0);
    }
}

/// A weight: see [`Visit::site`].
impl Module for Arc<dyn Site> {
    fn visit(&self, visit: &mut Visit) {
        visit.site(&**self);
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        let mut leaves = self.leaves();
        let mut buffers: Vec<Tensor> = self.buffers().into_iter().map(|(_, buffer)| buffer).collect();
        leaves.iter_mut().chain(&mut buffers).for_each(|x| visit.tensor(x));
        *self = self.with_tensors(&leaves, &buffers);
    }
}

impl<M: Module> Module for Option<M> {
    fn visit(&self, visit: &mut Visit) {
        self.iter().for_each(|module| module.visit(visit));
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        self.iter_mut().for_each(|module| module.visit_mut(visit));
    }
}

impl<M: Module + ?Sized> Module for Box<M> {
    fn visit(&self, visit: &mut Visit) {
        (**self).visit(visit);
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        (**self).visit_mut(visit);
    }
}

/// The parts of a list are named by their places.
impl<M: Module> Module for [M] {
    fn visit(&self, visit: &mut Visit) {
        self.iter().enumerate().for_each(|(i, module)| visit.field(&i.to_string(), module));
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        self.iter_mut().for_each(|module| visit.field(module));
    }
}

impl<M: Module> Module for Vec<M> {
    fn visit(&self, visit: &mut Visit) {
        self[..].visit(visit);
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        self[..].visit_mut(visit);
    }
}

impl<M: Module, const N: usize> Module for [M; N] {
    fn visit(&self, visit: &mut Visit) {
        self[..].visit(visit);
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        self[..].visit_mut(visit);
    }
}
