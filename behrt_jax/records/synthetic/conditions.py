"""The medicine of the clinical generator: conditions, occasions for a visit, and their codes.

Codes look like ICD-10 (``DX//``), ATC (``RX//``), and plain names for procedures (``PX//``) and
laboratory tests (``LAB//``). Each is written once as ``"CODE text"``. Rates, ages and links are
plausible, not estimated from any population.
"""

from dataclasses import dataclass

import numpy as np

STAGES = 3
"""Stages of a condition: found and first treated, followed up, advanced."""
STAGE_OF_STEP = np.array([0, 1, 1, 2])
"""Stage by the number of visits already spent on the condition; the last holds from then on."""

# Weight in each stage of diagnosis, first line, monitoring, second line and complication.
_STAGE_WEIGHTS = ((8.0, 4.0, 1.5, 0.05, 0.05), (1.0, 4.0, 4.0, 0.3, 0.2), (0.6, 0.5, 2.0, 4.0, 3.0))


@dataclass(frozen=True)
class Condition:
    """A chronic disease; codes as ``"CODE text"``."""

    name: str
    rate: float
    """Chance to have it at the age where it is commonest, with no other condition (a clinic's patients,
    so higher than in a population)."""
    age: float
    """That age, in years."""
    width: float
    """Standard deviation, in years, of the bell curve of the chance around that age."""
    diagnosis: str
    first_line: str
    monitoring: tuple[str, ...]
    second_line: str
    complication: str
    raises: tuple[tuple[str, float], ...] = ()
    """Later conditions of the table that it makes likelier: name, factor on the chance."""
    sex: str = "FM"
    """Sexes that can have it."""

    def stages(self) -> tuple[dict[str, float], ...]:
        """For each stage, ``"CODE text"`` -> weight of being noted in a visit."""
        first, last = ((self.diagnosis,), (self.first_line,)), ((self.second_line,), (self.complication,))
        parts = (*first, self.monitoring, *last)
        return tuple(
            {code: w / len(codes) ** 0.5 for codes, w in zip(parts, weights, strict=True) for code in codes}
            for weights in _STAGE_WEIGHTS
        )


@dataclass(frozen=True)
class Occasion:
    """A visit that no chronic condition explains: acute, seasonal or routine care."""

    name: str
    weight: float
    """Relative frequency where age, sex and season allow it."""
    ages: tuple[float, float]
    """From, up to and without; years."""
    codes: tuple[str, ...]
    """``"CODE text"``, the most frequent first: weights fall by half."""
    month: int | None = None
    """Month of its season's height (1 to 12)."""
    sex: str = "FM"

    def weights(self) -> dict[str, float]:
        """``"CODE text"`` -> weight of being noted in a visit."""
        return {code: 4.0 / 2**place for place, code in enumerate(self.codes)}


# Codes that several conditions or occasions share.
_CREATININE = "LAB//CREATININE Creatinine in serum"
_LDL = "LAB//LDL LDL cholesterol"
_ECG = "PX//ECG Electrocardiogram"
_GLUCOSE = "LAB//GLUCOSE Glucose in plasma"
_PSA = "LAB//PSA Prostate-specific antigen"
_CBC = "LAB//CBC Complete blood count"
_HEAD_CT = "PX//HEAD_CT Computed tomography of the head"
_MAMMOGRAPHY = "PX//MAMMOGRAPHY Mammography"
_PHYSIOTHERAPY = "PX//PHYSIOTHERAPY Physiotherapy"
_METASTASES = "DX//C79 Metastases of other sites"
_CHECK_UP = "PX//CHECK_UP Health check-up"
_WELL_CHILD = "PX//WELL_CHILD Well-child visit"
_PARACETAMOL = "RX//N02BE01 Paracetamol"
_AMOXICILLIN = "RX//J01CA04 Amoxicillin"
_TETANUS = "RX//J07AM51 Tetanus and diphtheria vaccine"
_MMR = "RX//J07BD52 Measles, mumps and rubella vaccine"

# fmt: off
CONDITIONS = (
    Condition("obesity", 0.26, 48, 20, "DX//E66 Obesity", "PX//DIETARY_ADVICE Dietary advice",
              (_GLUCOSE,), "RX//A10BJ06 Semaglutide", "DX//G47 Sleep apnoea",
              raises=(("type 2 diabetes", 3), ("hypertension", 2), ("osteoarthritis", 3), ("GERD", 2))),
    Condition("hypertension", 0.32, 66, 17, "DX//I10 Essential hypertension", "RX//C09AA05 Ramipril",
              ("PX//BLOOD_PRESSURE_24H Ambulatory blood pressure", _CREATININE), "RX//C08CA01 Amlodipine",
              "DX//I11 Hypertensive heart disease",
              raises=(("type 2 diabetes", 1.5), ("coronary disease", 2), ("stroke", 2))),
    Condition("type 2 diabetes", 0.21, 63, 15, "DX//E11 Type 2 diabetes", "RX//A10BA02 Metformin",
              ("LAB//HBA1C Haemoglobin A1c", _CREATININE), "RX//A10AE04 Insulin glargine",
              "DX//H36 Diabetic retinopathy",
              raises=(("chronic kidney disease", 3), ("coronary disease", 2))),
    Condition("coronary disease", 0.18, 69, 12, "DX//I25 Chronic ischaemic heart disease",
              "RX//B01AC06 Acetylsalicylic acid", (_LDL, _ECG, "RX//C10AA05 Atorvastatin"),
              "PX//CORONARY_STENT Coronary stent", "DX//I21 Acute myocardial infarction",
              raises=(("heart failure", 3), ("atrial fibrillation", 2))),
    Condition("atrial fibrillation", 0.16, 76, 11, "DX//I48 Atrial fibrillation", "RX//B01AF02 Apixaban",
              (_ECG,), "RX//C01BD01 Amiodarone", "PX//CARDIOVERSION Cardioversion",
              raises=(("heart failure", 2), ("stroke", 3))),
    Condition("heart failure", 0.11, 77, 11, "DX//I50 Heart failure", "RX//C03CA01 Furosemide",
              ("PX//ECHOCARDIOGRAM Echocardiogram", _CREATININE), "RX//C09DX04 Sacubitril and valsartan",
              "DX//J81 Pulmonary oedema", raises=(("chronic kidney disease", 2),)),
    Condition("stroke", 0.10, 75, 12, "DX//I63 Cerebral infarction", "RX//B01AC04 Clopidogrel",
              (_HEAD_CT, _LDL), _PHYSIOTHERAPY, "DX//I69 Sequelae of stroke",
              raises=(("dementia", 2), ("epilepsy", 4))),
    Condition("chronic kidney disease", 0.13, 73, 14, "DX//N18 Chronic kidney disease",
              "RX//C09CA01 Losartan", (_CREATININE, "LAB//URINE_ALBUMIN Albumin in urine"),
              "RX//B03XA01 Erythropoietin", "PX//DIALYSIS Haemodialysis", raises=(("anaemia", 4),)),
    Condition("COPD", 0.18, 68, 11, "DX//J44 Chronic obstructive pulmonary disease",
              "RX//R03BB04 Tiotropium", ("PX//SPIROMETRY Spirometry",), "RX//R03AK07 Formoterol, budesonide",
              "DX//J96 Respiratory failure", raises=(("depression", 3),)),
    Condition("asthma", 0.32, 12, 14, "DX//J45 Asthma", "RX//R03AC02 Salbutamol",
              ("PX//PEAK_FLOW Peak expiratory flow",), "RX//R03BA02 Budesonide, inhaled",
              "DX//J46 Status asthmaticus"),
    Condition("depression", 0.17, 48, 22, "DX//F32 Depressive episode", "RX//N06AB06 Sertraline",
              ("PX//PHQ9 Depression questionnaire PHQ-9",), "RX//N06AX16 Venlafaxine",
              "DX//F33 Recurrent depressive disorder", raises=(("anxiety", 4),)),
    Condition("anxiety", 0.14, 32, 15, "DX//F41 Anxiety disorder", "PX//PSYCHOTHERAPY Psychotherapy",
              ("PX//GAD7 Anxiety questionnaire GAD-7",), "RX//N06AB10 Escitalopram", "DX//F51 Insomnia"),
    Condition("hypothyroidism", 0.14, 55, 18, "DX//E03 Hypothyroidism", "RX//H03AA01 Levothyroxine",
              ("LAB//TSH Thyrotropin",), "PX//THYROID_ULTRASOUND Ultrasound of the thyroid",
              "DX//E04 Goitre"),
    Condition("osteoarthritis", 0.21, 70, 13, "DX//M17 Osteoarthritis of the knee",
              "RX//M01AE01 Ibuprofen", (_PHYSIOTHERAPY,), "RX//N02AX02 Tramadol",
              "PX//KNEE_REPLACEMENT Knee replacement"),
    Condition("rheumatoid arthritis", 0.10, 56, 14, "DX//M06 Rheumatoid arthritis",
              "RX//L04AX03 Methotrexate", ("LAB//CRP C-reactive protein", _CBC), "RX//L04AB04 Adalimumab",
              "DX//J99 Rheumatoid lung disease", raises=(("anaemia", 2),)),
    Condition("breast cancer", 0.21, 60, 13, "DX//C50 Malignant neoplasm of the breast",
              "RX//L02BA01 Tamoxifen", (_MAMMOGRAPHY,), "RX//L01CD02 Docetaxel", _METASTASES, sex="F"),
    Condition("prostate cancer", 0.21, 70, 9, "DX//C61 Malignant neoplasm of the prostate",
              "RX//L02AE02 Leuprorelin", (_PSA,), "RX//L02BX03 Abiraterone", _METASTASES, sex="M"),
    Condition("colorectal cancer", 0.10, 69, 12, "DX//C18 Malignant neoplasm of the colon",
              "PX//COLECTOMY Colectomy", ("LAB//CEA Carcinoembryonic antigen", _CBC),
              "RX//L01XA03 Oxaliplatin", "DX//C78 Metastases of the liver", raises=(("anaemia", 3),)),
    Condition("dementia", 0.32, 84, 8, "DX//G30 Alzheimer disease", "RX//N06DA02 Donepezil",
              ("PX//MMSE Mini-mental state examination",), "RX//N06DX01 Memantine", "DX//F05 Delirium"),
    Condition("epilepsy", 0.06, 45, 40, "DX//G40 Epilepsy", "RX//N03AX09 Lamotrigine",
              ("PX//EEG Electroencephalogram",), "RX//N03AX14 Levetiracetam", "DX//G41 Status epilepticus"),
    Condition("migraine", 0.19, 30, 13, "DX//G43 Migraine", "RX//N02CC01 Sumatriptan", (_HEAD_CT,),
              "RX//N02CD01 Erenumab", "DX//G44 Chronic headache"),
    Condition("anaemia", 0.09, 60, 30, "DX//D50 Iron deficiency anaemia", "RX//B03AA07 Ferrous sulfate",
              ("LAB//FERRITIN Ferritin", _CBC), "RX//B03AC01 Iron, intravenous",
              "PX//TRANSFUSION Transfusion"),
    Condition("GERD", 0.16, 50, 18, "DX//K21 Gastro-oesophageal reflux", "RX//A02BC01 Omeprazole",
              ("PX//GASTROSCOPY Gastroscopy",), "RX//A02BA03 Famotidine", "DX//K22 Barrett oesophagus"),
    Condition("psoriasis", 0.11, 38, 17, "DX//L40 Psoriasis", "RX//D05AX02 Calcipotriol",
              ("PX//SKIN_REVIEW Skin severity index",), "RX//L04AC05 Ustekinumab",
              "DX//M07 Psoriatic arthropathy"),
)

OCCASIONS = (
    Occasion("influenza", 6, (0, 120), ("DX//J10 Influenza", "RX//J05AH02 Oseltamivir", _PARACETAMOL),
             month=1),
    Occasion("hay fever", 6, (4, 70), ("DX//J30 Allergic rhinitis", "RX//R06AE07 Cetirizine"), month=5),
    Occasion("gastroenteritis", 3, (0, 120), ("DX//A09 Gastroenteritis", "RX//A07CA Oral rehydration"),
             month=8),
    Occasion("Lyme disease", 2, (3, 80), ("DX//A69 Lyme disease", "RX//J01AA02 Doxycycline"), month=7),
    Occasion("bronchiolitis", 8, (0, 2), ("DX//J21 Acute bronchiolitis", "LAB//RSV RS virus test"),
             month=12),
    Occasion("pneumonia", 3, (40, 120), ("DX//J18 Pneumonia", "PX//CHEST_XRAY Chest X-ray", _AMOXICILLIN),
             month=2),
    Occasion("otitis media", 3, (0, 10), ("DX//H66 Otitis media", _AMOXICILLIN, _PARACETAMOL)),
    Occasion("urinary infection", 1.5, (15, 120), ("DX//N39 Urinary tract infection",
             "LAB//URINE_CULTURE Urine culture", "RX//J01XE01 Nitrofurantoin"), sex="F"),
    Occasion("injury", 1.5, (2, 120), ("DX//S93 Sprain of the ankle", "PX//LIMB_XRAY X-ray of a limb",
             _PARACETAMOL)),
    Occasion("back pain", 1.5, (18, 120), ("DX//M54 Back pain", "RX//M01AB05 Diclofenac", _PHYSIOTHERAPY)),
    Occasion("antenatal care", 2, (18, 43), ("DX//Z34 Supervision of pregnancy",
             "PX//OBSTETRIC_ULTRASOUND Obstetric ultrasound", "RX//B03BB01 Folic acid", _CBC), sex="F"),
    Occasion("infant check", 6, (0, 2), (_WELL_CHILD, "RX//J07CA02 Diphtheria, pertussis, polio vaccine",
             _MMR)),
    Occasion("child check", 2, (2, 12), (_WELL_CHILD, "PX//VISION_TEST Vision test", _MMR)),
    Occasion("adolescent check", 2, (12, 18), ("RX//J07BM03 Papillomavirus vaccine", _CHECK_UP, _TETANUS)),
    Occasion("adult check", 1.5, (18, 65), (_CHECK_UP, _LDL, _GLUCOSE, _TETANUS)),
    Occasion("senior check", 2, (65, 120), (_CHECK_UP, "RX//J07BK03 Zoster vaccine", _CBC, _CREATININE)),
    Occasion("influenza vaccination", 6, (60, 120), ("RX//J07BB02 Influenza vaccine",
             "RX//J07AL02 Pneumococcal vaccine"), month=10),
    Occasion("cervical screening", 1, (25, 66), ("PX//PAP_SMEAR Cervical smear", _CHECK_UP), sex="F"),
    Occasion("breast screening", 1, (50, 71), (_MAMMOGRAPHY, _CHECK_UP), sex="F"),
    Occasion("prostate screening", 1, (55, 76), (_PSA, _CHECK_UP), sex="M"),
    Occasion("bowel screening", 1, (50, 76), ("LAB//STOOL_BLOOD Occult blood in stool",
             "PX//COLONOSCOPY Colonoscopy")),
)
# fmt: on


def code_of(entry: str) -> str:
    """The code of a ``"CODE text"`` entry."""
    return entry.partition(" ")[0]


def themes() -> list[dict[str, float]]:
    """Everything that a visit can be about: every stage of every condition in turn, then every occasion.

    Row ``STAGES * c + s`` is stage s of condition c; row ``STAGES * len(CONDITIONS) + o`` is
    occasion o. Each maps ``"CODE text"`` to the weight of the code in such a visit.
    """
    stages = [stage for condition in CONDITIONS for stage in condition.stages()]
    return stages + [occasion.weights() for occasion in OCCASIONS]


def named_codes() -> dict[str, str]:
    """Every code of the table, in order of first use -> its text."""
    return {code_of(entry): entry.partition(" ")[2] for theme in themes() for entry in theme}


def unspecific_codes(count: int) -> dict[str, str]:
    """Codes that belong to no condition, the most frequent first -> their texts."""
    texts = {}
    for number in range(-(-count // 4)):
        rest, chapter = divmod(number, 100)
        texts[f"DX//R{chapter:02d}.{rest}"] = f"Unspecific finding {number}"
        texts[f"RX//V{chapter:02d}AX{rest:02d}"] = f"Other medication {number}"
        texts[f"LAB//{50800 + number}"] = f"Other laboratory test {number}"
        texts[f"PX//{90000 + number}"] = f"Other procedure {number}"
    return dict(list(texts.items())[:count])
