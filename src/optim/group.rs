//! Groups of parameters that share settings.

use crate::error::{Error, Result};
use crate::tensor::Tensor;
use std::borrow::Borrow;
use std::collections::HashSet;

/// Parameters that share settings.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::optim::{AdamW, AdamWConfig, Group};
/// let [w, bias] = [&[2usize, 3][..], &[2]].map(|s| Tensor::ones(&gpu, s).requires_grad());
/// let matrices = Group::new([("w", &w)]).weight_decay(0.1);
/// let rest = Group::new([("bias", &bias)]).lr_scale(2.0);
/// let optimizer = AdamW::new(&gpu, vec![matrices, rest], AdamWConfig::default())?;
/// assert_eq!(optimizer.state_bytes(), 2 * 4 * 8); // two moments of 8 numbers
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Group {
    /// Leaves by name; the names must be unique over all groups of an optimizer.
    pub params: Vec<(String, Tensor)>,
    /// The fraction of a weight that a step at learning rate 1 removes. Use 0 for norms and biases.
    pub weight_decay: f32,
    /// Multiplies the learning rate of every step.
    pub lr_scale: f32,
}

impl Group {
    /// Makes a group without weight decay, at the unscaled learning rate. All parameters of a model are
    /// `Group::new(model.parameters().trainable())`.
    pub fn new<N: Into<String>, T: Borrow<Tensor>>(params: impl IntoIterator<Item = (N, T)>) -> Group {
        let params =
            params.into_iter().map(|(name, tensor)| (name.into(), tensor.borrow().clone())).collect();
        Group { params, weight_decay: 0.0, lr_scale: 1.0 }
    }

    /// Makes two groups: the parameters for which `first` holds, and all others. Each keeps the order of `params`.
    ///
    /// The usual choice is weight decay for matrices only, and not for the norms and biases, which have one axis:
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor, optim::{AdamW, AdamWConfig, Group}};
    /// # let gpu = Gpu::open()?;
    /// # let [w, bias] = [&[2usize, 3][..], &[2]].map(|s| Tensor::ones(&gpu, s).requires_grad());
    /// let params = [("w", &w), ("bias", &bias)];
    /// let [matrices, rest] = Group::split(params, |_, p| p.shape().len() > 1);
    /// assert_eq!((&matrices.params[0].0[..], &rest.params[0].0[..]), ("w", "bias"));
    /// let groups = vec![matrices.weight_decay(0.1), rest];
    /// let optimizer = AdamW::new(&gpu, groups, AdamWConfig::default())?;
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn split<N: Into<String>, T: Borrow<Tensor>>(
        params: impl IntoIterator<Item = (N, T)>,
        first: impl Fn(&str, &Tensor) -> bool,
    ) -> [Group; 2] {
        let all = Group::new(params).params;
        let parts: (Vec<_>, Vec<_>) = all.into_iter().partition(|(name, tensor)| first(name, tensor));
        [parts.0, parts.1].map(|params| Group { params, weight_decay: 0.0, lr_scale: 1.0 })
    }

    /// Makes one group for each of `tests`: a parameter goes to the first of them that holds for it.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor, optim::Group};
    /// # let gpu = Gpu::open()?;
    /// # let [table, w, bias] = [&[4usize, 3][..], &[2, 3], &[2]].map(|s| Tensor::ones(&gpu, s));
    /// let params = [("table", &table), ("head.w", &w), ("head.bias", &bias)];
    /// let [embedding, plain, matrices] = Group::matching(params, [
    ///     &|name, _| name.starts_with("table"),
    ///     &|name, _| name.ends_with("bias"),
    ///     &|name, _| name.ends_with(".w"),
    /// ])?;
    /// let groups = vec![embedding.lr_scale(0.1), plain, matrices.weight_decay(0.1)];
    /// # assert_eq!(groups.iter().map(|g| &g.params[0].0[..]).collect::<Vec<_>>(), ["table", "head.bias", "head.w"]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Errors
    /// When none of the tests holds for a parameter, a test got no parameter, or a name comes twice. The message has the
    /// name, or the number of the test.
    // An alias would hide from the reader of the page what a test takes.
    #[allow(clippy::type_complexity)]
    pub fn matching<N: Into<String>, T: Borrow<Tensor>, const K: usize>(
        params: impl IntoIterator<Item = (N, T)>,
        tests: [&dyn Fn(&str, &Tensor) -> bool; K],
    ) -> Result<[Group; K]> {
        let mut groups = [(); K].map(|()| Group { params: Vec::new(), weight_decay: 0.0, lr_scale: 1.0 });
        let mut names = HashSet::new();
        for (name, tensor) in Group::new(params).params {
            if !names.insert(name.clone()) {
                return Err(Error::config(format!("Group::matching: two parameters are named `{name}`")));
            }
            let Some(group) = tests.iter().position(|test| test(&name, &tensor)) else {
                return Err(Error::config(format!(
                    "Group::matching: no test holds for `{name}` {}; add one, or `&|_, _| true` as the last",
                    tensor.shape()
                )));
            };
            groups[group].params.push((name, tensor));
        }
        match groups.iter().position(|group| group.params.is_empty()) {
            Some(test) => Err(Error::config(format!(
                "Group::matching: test {test} got no parameter; is a name misspelt, or does an earlier test take all?"
            ))),
            None => Ok(groups),
        }
    }

    /// Sets the weight decay.
    pub fn weight_decay(self, weight_decay: f32) -> Group {
        Group { weight_decay, ..self }
    }

    /// Sets the factor of the learning rate.
    pub fn lr_scale(self, lr_scale: f32) -> Group {
        Group { lr_scale, ..self }
    }
}
