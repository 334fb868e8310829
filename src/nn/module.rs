//! Modules: what holds parameters and buffers, and the walk over them that lists, saves, loads, freezes, casts and moves.

use super::parameters::{Identity, Item, Parameters, Role};
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
    /// changed once, so what was tied stays tied, and keeps its shape. Leaves stay leaves, and what is frozen stays frozen: the result
    /// is detached. Two handles on the same elements, one of them detached, are two tensors here.
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
        replace(self, &mut |item| {
            let x = &item.tensor;
            if item.role == Role::Constant {
                return Ok(x.clone());
            }
            let y = change(&item.names[0], x)?;
            let y = if y.is_tracked() { y.detach() } else { y };
            Ok(if x.is_leaf() && y.dtype().is_float() { y.requires_grad() } else { y })
        })
    }

    /// A copy with elements of its own, as `copy.deepcopy(model)` in PyTorch. What was tied is tied in the copy, leaves are leaves, and
    /// what is frozen is frozen. A plain `clone` is another handle on the same parameters.
    ///
    /// # Errors
    /// As [`Module::map`].
    ///
    /// ```
    /// # use tiebeam::{Gpu, Rng, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::nn::{Init, Linear, Module};
    /// let layer = Linear::new(&gpu, 3, 2, true, Init::XavierUniform, &mut Rng::new(1));
    /// let copy = layer.deep_copy()?;
    /// assert_eq!(copy.parameters().trainable().len(), 2);
    /// let [a, b] = [&layer, &copy].map(|layer| layer.parameters().named()[0].1.clone());
    /// assert!(a.leaf_id() != b.leaf_id() && a.to_vec::<f32>()? == b.to_vec::<f32>()?);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    fn deep_copy(&self) -> Result<Self>
    where
        Self: Sized + Clone,
    {
        let mut copy = self.clone();
        copy.map(|_, x| Ok(x.detach().copy()))?;
        Ok(copy)
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
    if let Some((name, _)) = all.computed.first() {
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
        // A field that is written `r#type` is named `type`.
        self.path = join(&self.path, name.strip_prefix("r#").unwrap_or(name));
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

impl<'a> VisitMut<'a> {
    /// Replaces the tensors of these identities, each of which stands beside its new one.
    pub(super) fn new(made: &'a HashMap<Identity, (Tensor, Tensor)>) -> VisitMut<'a> {
        VisitMut { made }
    }

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
