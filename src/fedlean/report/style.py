"""The page's style sheet: one column on a phone, two on a desk, light and dark.

Series colours are Okabe and Ito's, which stay distinct for colour-blind readers; the dark scheme
has lighter ones of the same hues.
"""

CSS = """
:root{color-scheme:light dark;--bg:#fff;--panel:#f7f7f5;--ink:#1c1c1a;--muted:#62625d;
--grid:#dcdcd6;--s0:#0072b2;--s1:#d55e00;--s2:#009e73;--s3:#b65a92;--s4:#b88600;--s5:#3a9bd0}
@media (prefers-color-scheme:dark){:root{--bg:#151617;--panel:#1d1f20;--ink:#e9e9e4;--muted:#a3a39c;
--grid:#3a3c3e;--s0:#4ea6e6;--s1:#ff8a42;--s2:#2fc796;--s3:#e291c2;--s4:#e9bd3d;--s5:#93d5f7}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2.2rem 1.5rem 3rem;
max-width:1180px;
background:var(--bg);
color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;
font-variant-ligatures:none}
h1{font-size:1.7rem;line-height:1.2;margin:.1rem 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.4rem 0 .6rem}
p{max-width:46rem;margin:.5rem 0}
.kicker{color:var(--muted);font-size:.9rem;margin:0}
.lead p{font-size:1.12rem;overflow-wrap:anywhere}
.note{border-left:3px solid var(--s1);padding-left:.8rem;list-style:none}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:.6rem;
margin:1.3rem 0 0}
.tiles div{background:var(--panel);border-radius:6px;padding:.55rem .8rem}
.tiles dt{color:var(--muted);font-size:.82rem}
.tiles dd{margin:0;font-size:1.2rem;font-variant-numeric:tabular-nums}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));
gap:1.6rem 2rem}
figure{margin:0;min-width:0;max-width:600px}
figcaption{font-weight:600;font-size:.95rem;margin-bottom:.2rem}
svg[role=img]{display:block;width:100%;height:auto}
svg text{font-family:inherit!important}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;list-style:none;margin:.1rem 0 0;padding:0;
font-size:.85rem;color:var(--muted)}
.legend li{overflow-wrap:anywhere}
.swatch{width:26px;height:10px;margin-right:.4em;vertical-align:baseline}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.3rem .9rem;vertical-align:top;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}
thead th{color:var(--muted);font-weight:500;white-space:normal;
border-bottom:1px solid var(--grid);vertical-align:bottom}
thead td{border-bottom:1px solid var(--grid)}
tbody th{font-weight:400}
tbody tr+tr>*{border-top:1px solid var(--grid)}
tbody.group th[colspan]{font-weight:600;padding-top:1rem}
td.missed{text-align:left;color:var(--muted);white-space:normal}
td small{display:block;color:var(--muted);font-size:.82rem}
.name{overflow-wrap:break-word;white-space:normal;max-width:16rem}
table.summary td,table.summary thead th{text-align:left;min-width:7rem}
table.confusion td{padding:.2rem .45rem;
background:color-mix(in srgb,var(--s0) calc(var(--share,0)*70%),transparent)}
details{margin:.6rem 0}
summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;background:var(--panel);border-radius:6px;padding:.8rem;font-size:.82rem;
line-height:1.4}
footer{margin-top:2.5rem;color:var(--muted);font-size:.85rem}
@media (max-width:560px){body{padding:1.2rem .9rem 2rem}th,td{padding:.3rem .3rem}
table{font-size:.8rem}.lead p{font-size:1.02rem}.group .swatch{display:none}
table.summary td,table.summary th,table.summary thead th{
white-space:normal;min-width:4.8rem;overflow-wrap:anywhere}}
@media print{body{max-width:none}figure{break-inside:avoid}}
"""
