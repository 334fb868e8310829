//! Tables of a trained network's kernels, and the convolution with them: for inference, where weights are fixed.
//!
//! A spatial kernel is a function of two numbers for each channel, whatever network computes it: `x = o.d` and
//! `r = |d - (o.d) o|` (in the plane, `r` is the signed second attribute; without orientations there is only `|d|`). A
//! cubic B-spline through its values on a grid takes 16 multiply-adds per edge, orientation and channel, for any width of
//! the basis. It has two continuous derivatives, so forces, its exact gradient, are smooth. The envelope is not in the
//! table: messages still end exactly at the radius.

use crate::ops::points::edges::Edges;
use crate::ops::points::kernel_basis::{Basis, EdgeFeatures};
use crate::ops::points::table_conv::SplineTable;
use crate::tensor::Tensor;

/// The tables that replace a convolution's bases and projections.
#[derive(Clone, Debug)]
pub struct Tables {
    /// The spatial kernel, with its channels padded to a multiple of 4.
    pub spatial: SplineTable,
    /// The fiber kernel, `[O, O, channels]`, padded likewise. `None` without orientations. It is exact, because
    /// orientations are fixed.
    pub fiber: Option<Tensor>,
}

/// The place of each edge in a table, `[E, O, 4]`: two attributes, the envelope, and 0.
pub(in crate::geometry) struct TablePlaces(Tensor);

impl TablePlaces {
    /// # Panics
    /// When a gradient of the basis is wanted, because tables do not use the basis.
    #[track_caller]
    pub fn new(
        d: &Tensor,
        orientations: Option<Tensor>,
        envelope: Option<&Tensor>,
        basis: &Basis,
    ) -> TablePlaces {
        let weights = [&basis.w1, &basis.b1, &basis.w2, &basis.b2];
        assert!(!weights.iter().any(|w| w.is_tracked()), "{REFUSED}");
        let attributes = d.edge_features(&EdgeFeatures { orientations, degree: 1 });
        let place = Tensor::from_slice(d.gpu(), &[0.0f32, 0.0, 1.0, 0.0], [1, 1, 4]);
        let envelope = envelope.map_or(place.clone(), |w| w.reshape([w.count(), 1, 1]).mul(&place));
        let seen = attributes.add(&envelope);
        seen.evaluate();
        TablePlaces(seen)
    }

    /// Returns the sum over neighbours of `h [N, O, C]`, C a multiple of 4.
    #[track_caller]
    pub fn conv(
        &self,
        h: &Tensor,
        kernels: [Option<&Tensor>; 2],
        tables: Option<&Tables>,
        edges: &Edges,
    ) -> Tensor {
        assert!(!kernels.iter().flatten().any(|w| w.is_tracked()), "{REFUSED}");
        let tables = tables.expect("ponita: a network by tables has none; make it with Ponita::tabulate");
        h.table_conv(&self.0, &tables.spatial, edges)
    }
}

const REFUSED: &str =
    "ponita: tables give kernels and bases no gradient; train the network that they were made of";
