//! Methods that change one option of a struct: structs of options are `#[non_exhaustive]`, so that an option more breaks no caller,
//! and such a struct cannot be written as a literal outside this crate.

/// Gives a struct of options one method per field, which takes the struct, changes that field and returns the struct.
macro_rules! setters {
    ($type:ident $(<$life:lifetime>)? { $($field:ident: $value:ty),* $(,)? }) => {
        impl $(<$life>)? $type $(<$life>)? {
            $(
                #[doc = concat!("Returns these options with another [`", stringify!($field), "`](Self#structfield.", stringify!($field), ").")]
                #[must_use]
                pub fn $field(mut self, $field: $value) -> Self {
                    self.$field = $field;
                    self
                }
            )*
        }

        // A field that the list leaves out does not compile.
        const _: fn($type) = |$type { $($field: _,)* }| ();
    };
}
pub(crate) use setters;
