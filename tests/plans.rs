//! What the ops will launch on devices that are not here: plans are pure functions of sizes and of the device's class. No device
//! needed.
#[test]
fn print() {
    use tiebeam::gpu::DeviceClass;
    use tiebeam::ops::matmul::plan::{Sizes, plan};
    for name in ["h200", "integrated", "cpu"] {
        let class = DeviceClass::named(name).unwrap();
        println!("== {name}");
        for (b, m, n, k) in [(1,256,256,256),(1,512,512,512),(1,1024,1024,1024),(1,2048,768,768),(32,128,128,64),(1,1,2048,2048),(1,8,2048,2048),(1,2048,8,2048),(1,64,64,16384),(1,2048,2048,2048),(1,4096,4096,4096)] {
            println!("{b} {m} {n} {k}");
            for p in plan(&class, Sizes{batch:b,m,n,k,turned:[false;2],coop:None}) { println!("    {p}"); }
        }
        for (m,n,k) in [(64,64,131072),(768,768,8192),(3072,768,8192),(128,512,1000)] {
            println!("dW {m} {n} {k}");
            for p in plan(&class, Sizes{batch:1,m,n,k,turned:[true,false],coop:None}) { println!("    {p}"); }
        }
        for s in [[1,131072,64],[1,4096,1024],[1,1<<24,1],[4096,1024,1],[1,1024,128]] {
            println!("sum {s:?}");
            for p in tiebeam::ops::reduce::plan(&class, s) { println!("    {p}"); }
        }
        for s in [[256,768],[4096,768]] {
            println!("norm {s:?}");
            for p in tiebeam::ops::norm::plan(&class, s).concat() { println!("    {p}"); }
            for p in tiebeam::ops::softmax::plan_rows(&class, s) { println!("    {p}"); }
        }
        for s in [[4,8,8,512,512,64],[8,16,16,1024,1024,64],[4,32,8,1,2048,64]] {
            println!("attention {s:?}");
            for p in tiebeam::ops::attention::plan(&class, s).concat() { println!("    {p}"); }
        }
        for p in tiebeam::ops::embedding::plan_sum([8192,512,4096]) { println!("    {p}"); }
    }
}
